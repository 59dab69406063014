"""Closed schemas: the part of JSON Schema (draft 2020-12) that statements are described in, and its checker.

A schema built here is published as it is, and `check` holds every predicate against it when it is signed and
when it is read. Unknown fields are refused. Nothing is a float: a number with a fraction is a decimal string,
since JSON parsers do not agree on doubles.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from harness.errors import VerificationFailed

DIALECT = "https://json-schema.org/draft/2020-12/schema"

Schema = dict[str, Any]

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


_Departure = tuple[str, str]
"""The path below the value, and what is wrong there."""
_Checker = Callable[[Any], _Departure | None]
_known: dict[int, tuple[Schema, _Checker]] = {}
"""Identity of a schema → the schema, so that it stays, and its checker."""

_TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": (list, tuple),
    "string": str,
    "boolean": bool,
    "null": type(None),
    "integer": int,
}


def _told(path: str, reason: str) -> str:
    return f"{path.lstrip('.') or 'it'} {reason}"


def _compiled(schema: Schema) -> _Checker:
    """What checks a value against ``schema``; knows the keywords that this module uses."""
    known = _known.get(id(schema))
    if known is None:
        known = _known[id(schema)] = (schema, _compile(schema))
    return known[1]


def _compile(schema: Schema) -> _Checker:
    if "anyOf" in schema:
        return _any_of([_compiled(option) for option in schema["anyOf"]])
    if "const" in schema:
        wanted = schema["const"]
        return lambda value: None if value == wanted else ("", f"is not {wanted!r}")
    if "enum" in schema:
        names = frozenset(schema["enum"])
        reason = ("", f"is none of {', '.join(schema['enum'])}")
        return lambda value: None if isinstance(value, str) and value in names else reason
    return _of_type(schema["type"], schema)


def _any_of(options: list[_Checker]) -> _Checker:
    def check_any(value: Any) -> _Departure | None:
        found = []
        for option in options:
            departure = option(value)
            if departure is None:
                return None
            found.append(departure)
        return max(found, key=lambda each: len(_told(*each)))

    return check_any


def _of_type(kind: str, schema: Schema) -> _Checker:
    types, reason = _TYPES[kind], ("", f"is no {kind}")
    inner = _INNER.get(kind, _nothing_more)(schema)
    boolean_too = kind == "boolean"

    def check_type(value: Any) -> _Departure | None:
        # In Python a boolean is an integer.
        if not isinstance(value, types) or (value is True or value is False) is not boolean_too:
            return reason
        return inner(value)

    return check_type


def _nothing_more(_: Schema) -> _Checker:
    return lambda value: None


def _integer(schema: Schema) -> _Checker:
    low, high = schema["minimum"], schema["maximum"]
    return lambda value: None if low <= value <= high else ("", f"is {value}, outside {low} to {high}")


def _string(schema: Schema) -> _Checker:
    most, pattern = schema.get("maxLength"), schema.get("pattern", "")
    expression = re.compile(pattern.removesuffix("$"), re.ASCII)
    # JSON Schema's `$` is the end of the string, python's also matches before a final newline.
    matches = expression.fullmatch if pattern.endswith("$") else expression.match

    def check_string(value: str) -> _Departure | None:
        if most is not None and len(value) > most:
            return "", f"is longer than {most}"
        return None if not pattern or matches(value) else ("", f"is {value[:40]!r}")

    return check_string


def _array(schema: Schema) -> _Checker:
    check_item = _compiled(schema["items"])

    def check_array(value: Sequence[Any]) -> _Departure | None:
        for number, item in enumerate(value):
            found = check_item(item)
            if found is not None:
                return f"[{number}]{found[0]}", found[1]
        return None

    return check_array


def _object(schema: Schema) -> _Checker:
    required = schema.get("required", ())
    properties = {name: _compiled(inner) for name, inner in schema.get("properties", {}).items()}
    others = schema.get("additionalProperties", True)
    check_other = _compiled(others) if isinstance(others, dict) else None

    def check_object(value: Mapping[str, Any]) -> _Departure | None:
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

    return check_object


_INNER: dict[str, Callable[[Schema], _Checker]] = {
    "integer": _integer, "string": _string, "array": _array, "object": _object,
}  # fmt: skip
"""Type → what is checked besides."""
