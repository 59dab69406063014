"""Closed schemas: the part of JSON Schema (draft 2020-12) that statements are described in, and its checker.

A schema built here is published as it is, and `check` holds every predicate against it when it is signed and
when it is read. Unknown fields are refused. Nothing is a float: a number with a fraction is a decimal string,
since JSON parsers do not agree on doubles.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import orjson

from harness.errors import VerificationFailed

DIALECT = "https://json-schema.org/draft/2020-12/schema"

Schema = dict[str, Any]

ANYTHING: Schema = {}
NATURAL: Schema = {"type": "integer", "minimum": 0, "maximum": 2**53}
TEXT: Schema = {"type": "string", "maxLength": 65536}
FLAG: Schema = {"type": "boolean"}
NULL: Schema = {"type": "null"}
HEX64: Schema = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
HEX32: Schema = {"type": "string", "pattern": "^[0-9a-f]{32}$"}
DECIMAL: Schema = {"type": "string", "pattern": r"^-?[0-9]+(\.[0-9]+)?([eE][-+]?[0-9]+)?$"}
TIME: Schema = {"type": "string", "pattern": "^[0-9]{4}(-[0-9]{2}){2}T[0-9]{2}(:[0-9]{2}){2}Z$"}


def closed(optional: Mapping[str, Schema] | None = None, /, **properties: Schema) -> Schema:
    """An object of exactly ``properties``; those of ``optional`` may be absent."""
    return {
        "type": "object",
        "properties": properties | dict(optional or {}),
        "required": list(properties),
        "additionalProperties": False,
    }


def mapping(values: Schema) -> Schema:
    """An object of any names."""
    return {"type": "object", "additionalProperties": values}


def listing(items: Schema) -> Schema:
    """An array."""
    return {"type": "array", "items": items}


def either(*options: Schema) -> Schema:
    """A value that fits one of ``options``."""
    return {"anyOf": list(options)}


SCALAR = either(TEXT, {**NATURAL, "minimum": -(2**53)}, FLAG, NULL)
FACT = either(*SCALAR["anyOf"], listing(TEXT), mapping(SCALAR))
"""A scalar, a list of texts, or a flat object of scalars."""


def check(value: Any, *, where: str, schema: Schema) -> None:
    """Raise `VerificationFailed` with the path of the first place where ``value`` departs from ``schema``.

    ``schema`` is compiled at its first use and must not change after that.
    """
    found = _compiled(schema)(value)
    if found is not None:
        raise VerificationFailed(_told(*found), where=where)


class Repeating:
    """Checks JSON objects of one ``schema`` that come one after the other, as a run's statements do.

    What they have at ``paths`` is mostly what the one before had there. Where its JSON is that to the byte,
    it is not checked again, and is made the same Python object: thousands of them take the memory of one.
    Nobody may change what was checked.
    """

    def __init__(self, schema: Schema, *paths: tuple[str, ...]) -> None:
        self._schema, self._paths = schema, paths
        self._rest = functools.reduce(_without, paths, schema)
        self._before: dict[tuple[str, ...], tuple[bytes, Any]] = {}

    def check(self, value: Any, *, where: str) -> None:
        """`check` of ``value``, which strict JSON was read as."""
        fresh = {}
        for path in self._paths:
            parent = functools.reduce(_inner, path[:-1], value)
            if not isinstance(parent, dict) or path[-1] not in parent:
                break  # a departure from the schema
            text = orjson.dumps(parent[path[-1]])
            before = self._before.get(path)
            if before is not None and before[0] == text:
                parent[path[-1]] = before[1]
            else:
                fresh[path] = text, parent[path[-1]]
        else:
            check(value, where=where, schema=self._schema if fresh else self._rest)
            self._before |= fresh
            return
        check(value, where=where, schema=self._schema)


def _inner(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else None


def _without(schema: Schema, path: tuple[str, ...]) -> Schema:
    """``schema`` with anything at ``path``."""
    if not path:
        return ANYTHING
    inner = schema["properties"]
    return {**schema, "properties": {**inner, path[0]: _without(inner[path[0]], path[1:])}}


_Departure = tuple[str, str]
"""The path below the value, and what is wrong there."""
_Checker = Callable[[Any], _Departure | None]
_known: dict[int, tuple[Schema, _Checker]] = {}
"""Identity of a schema → the schema, so that it stays, and its checker."""


def _told(path: str, reason: str) -> str:
    return f"{path.lstrip('.') or 'it'} {reason}"


def _compiled(schema: Schema) -> _Checker:
    """What checks a value against ``schema``; knows the keywords that this module uses."""
    known = _known.get(id(schema))
    if known is None:
        known = _known[id(schema)] = (schema, _compile(schema))
    return known[1]


def _compile(schema: Schema) -> _Checker:
    if schema == ANYTHING:
        return lambda value: None
    if "anyOf" in schema:
        return _any_of(schema["anyOf"])
    if "const" in schema:
        wanted = schema["const"]
        return lambda value: None if value == wanted else ("", f"is not {wanted!r}")
    if "enum" in schema:
        names = frozenset(schema["enum"])
        reason = ("", f"is none of {', '.join(schema['enum'])}")
        return lambda value: None if isinstance(value, str) and value in names else reason
    return _OF_TYPE[schema["type"]](schema)


def _any_of(options: Sequence[Schema]) -> _Checker:
    """Of options of different types, so that the type of a value tells which one it has to fit."""
    kinds = [option.get("type", "string") for option in options]  # a constant is a string
    by_type = {
        kind: _compiled(option)
        for name, option in zip(kinds, options, strict=True)
        for kind in _READ_AS[name]
    }
    if len(set(kinds)) != len(kinds):
        raise ValueError(f"two options of the types {kinds} are of one type")
    reason = ("", f"is no {' or '.join(kinds)}")

    def check_any(value: Any) -> _Departure | None:
        check_option = by_type.get(type(value))
        if check_option is None:  # what is signed may be of a subclass, as torch's version is
            check_option = next((by_type[kind] for kind in by_type if isinstance(value, kind)), None)
        return reason if check_option is None else check_option(value)

    return check_any


_ARRAYS = (list, tuple)
_READ_AS: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": _ARRAYS,
    "string": (str,),
    "integer": (int,),
    "boolean": (bool,),
    "null": (type(None),),
}
"""The Python types of a JSON type."""


def _null(_: Schema) -> _Checker:
    return lambda value: None if value is None else ("", "is no null")


def _boolean(_: Schema) -> _Checker:
    return lambda value: None if value is True or value is False else ("", "is no boolean")


def _integer(schema: Schema) -> _Checker:
    low, high = schema["minimum"], schema["maximum"]

    def check_integer(value: Any) -> _Departure | None:
        if not isinstance(value, int) or isinstance(value, bool):  # in Python a boolean is an integer
            return "", "is no integer"
        return None if low <= value <= high else ("", f"is {value}, outside {low} to {high}")

    return check_integer


def _string(schema: Schema) -> _Checker:
    most, pattern = schema.get("maxLength"), schema.get("pattern", "")
    expression = re.compile(pattern.removesuffix("$"), re.ASCII)
    # JSON Schema's `$` is the end of the string, python's also matches before a final newline.
    matches = expression.fullmatch if pattern.endswith("$") else expression.match

    def check_string(value: Any) -> _Departure | None:
        if not isinstance(value, str):
            return "", "is no string"
        if most is not None and len(value) > most:
            return "", f"is longer than {most}"
        return None if not pattern or matches(value) else ("", f"is {value[:40]!r}")

    return check_string


def _array(schema: Schema) -> _Checker:
    check_item = _compiled(schema["items"])

    def check_array(value: Any) -> _Departure | None:
        if not isinstance(value, _ARRAYS):
            return "", "is no array"
        for number, item in enumerate(value):
            found = check_item(item)
            if found is not None:
                return f"[{number}]{found[0]}", found[1]
        return None

    return check_array


def _object(schema: Schema) -> _Checker:
    properties = {name: _compiled(inner) for name, inner in schema.get("properties", {}).items()}
    required, others = schema.get("required", ()), schema.get("additionalProperties", True)
    check_other = _compiled(others) if isinstance(others, dict) else None

    def check_named(value: Any) -> _Departure | None:
        """Of exactly the names of the schema, as nearly every object is."""
        if not isinstance(value, dict):
            return "", "is no object"
        if value.keys() != properties.keys():
            return check_any_names(value)
        for name, check_item in properties.items():
            found = check_item(value[name])
            if found is not None:
                return f".{name}{found[0]}", found[1]
        return None

    def check_any_names(value: Any) -> _Departure | None:
        if not isinstance(value, dict):
            return "", "is no object"
        for name in required:
            if name not in value:
                return f".{name}", "is missing"
        for name, item in value.items():
            check_item = properties.get(name, check_other)
            if check_item is None:
                if others is False:
                    return f".{name}", "is not a known field"
                continue
            found = check_item(item)
            if found is not None:
                return f".{name}{found[0]}", found[1]
        return None

    return check_named if properties else check_any_names


_OF_TYPE: dict[str, Callable[[Schema], _Checker]] = {
    "object": _object,
    "array": _array,
    "string": _string,
    "integer": _integer,
    "boolean": _boolean,
    "null": _null,
}
