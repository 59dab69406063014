"""Frozen dataclasses from JSON objects that have exactly their fields, each of its type."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Mapping, Set
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from harness.errors import VerificationFailed

Record = TypeVar("Record")

_hints: dict[type, Mapping[str, Any]] = {}
"""Names and types of the fields of a class, worked out once."""


def read(kind: type[Record], value: Any, where: str, later: Set[str] = frozenset()) -> Record:
    """A ``kind`` from a JSON object that has exactly its fields, each of its type: text, a count, another
    such class, a list of one of these as a tuple, or null.

    Fields that are named in ``later``, those of later versions, may be absent. Raises `VerificationFailed`.
    """
    if not isinstance(value, Mapping):
        raise VerificationFailed(f"`{kind.__name__.lower()}` is not an object", where=where)
    hints = _hints.get(kind) or _hints.setdefault(kind, get_type_hints(kind))
    odd_ones = set(value) ^ (set(hints) - (later - set(value)))
    if odd_ones:
        odd = ", ".join(sorted(odd_ones))[:200]
        raise VerificationFailed(
            f"missing or unknown fields in `{kind.__name__.lower()}`: {odd}", where=where
        )
    given = {name: hint for name, hint in hints.items() if name in value}
    return kind(**{name: _value(hint, value[name], f"{where} {name}", later) for name, hint in given.items()})


def _value(hint: Any, value: Any, where: str, later: Set[str]) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        inner = next(argument for argument in get_args(hint) if argument is not type(None))
        return None if value is None else _value(inner, value, where, later)
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise VerificationFailed("not a list", where=where)
        return tuple(_value(get_args(hint)[0], item, where, later) for item in value)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return read(hint, value, where, later)
    check = _CHECKS[hint]
    if not check(value):
        raise VerificationFailed(f"not a {'count' if hint is int else 'text'}", where=where)
    return value


_CHECKS: Mapping[type, Callable[[Any], bool]] = {
    str: lambda value: isinstance(value, str),
    int: lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 0,
}
