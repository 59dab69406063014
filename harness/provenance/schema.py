"""Closed schemas: the part of JSON Schema (draft 2020-12) that statements are described in, and its checker.

A schema built here is published as it is, and `check` holds every predicate against it when it is signed and
when it is read. Unknown fields are refused. Nothing is a float: a number with a fraction is a decimal string,
since JSON parsers do not agree on doubles.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
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
    """Raise `VerificationFailed` with the path of the first place where ``value`` departs from ``schema``."""
    reason = _departure(value, schema, "")
    if reason is not None:
        raise VerificationFailed(reason, where=where)


_TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": (list, tuple),
    "string": str,
    "boolean": bool,
    "null": type(None),
    "integer": int,
}


def _departure(value: Any, schema: Schema, path: str) -> str | None:
    """What is wrong with ``value``, or None; knows the keywords that this module uses."""
    place = path or "it"
    if "anyOf" in schema:
        reasons = [_departure(value, option, path) for option in schema["anyOf"]]
        return None if None in reasons else max(map(str, reasons), key=len)
    if "const" in schema:
        return None if value == schema["const"] else f"{place} is not {schema['const']!r}"
    if "enum" in schema:
        known = isinstance(value, str) and value in schema["enum"]
        return None if known else f"{place} is none of {', '.join(schema['enum'])}"
    kind = schema["type"]
    if not _is_a(kind, value):
        return f"{place} is no {kind}"
    if kind == "integer":
        low, high = schema["minimum"], schema["maximum"]
        return None if low <= value <= high else f"{place} is {value}, outside {low} to {high}"
    if kind == "string":
        return _string_departure(value, schema, place)
    if kind == "array":
        reasons = [
            _departure(item, schema["items"], f"{place}[{number}]") for number, item in enumerate(value)
        ]
        return next((reason for reason in reasons if reason is not None), None)
    return _object_departure(value, schema, path) if kind == "object" else None


def _is_a(kind: str, value: object) -> bool:
    return isinstance(value, _TYPES[kind]) and not (kind == "integer" and isinstance(value, bool))


def _string_departure(value: str, schema: Schema, place: str) -> str | None:
    if len(value) > schema.get("maxLength", len(value)):
        return f"{place} is longer than {schema['maxLength']}"
    # JSON Schema's `$` is the end of the string, python's also matches before a final newline.
    pattern = schema.get("pattern", "").removesuffix("$")
    matches = re.fullmatch if schema.get("pattern", "").endswith("$") else re.match
    return None if not pattern or matches(pattern, value, re.ASCII) else f"{place} is {value[:40]!r}"


def _object_departure(value: dict[str, Any], schema: Schema, path: str) -> str | None:
    properties = schema.get("properties", {})
    others = schema.get("additionalProperties", True)
    for name in schema.get("required", ()):
        if name not in value:
            return f"{path}.{name} is missing".lstrip(".")
    for name, item in value.items():
        inner = properties.get(name, others)
        if inner is False:
            return f"{path}.{name} is not a known field".lstrip(".")
        reason = _departure(item, inner, f"{path}.{name}".lstrip(".")) if isinstance(inner, dict) else None
        if reason is not None:
            return reason
    return None
