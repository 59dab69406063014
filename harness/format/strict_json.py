"""JSON with one meaning: what is ambiguous is refused.

- no duplicate key (other parsers keep the last one, silently), no NaN or Infinity, no integer beyond 2**53
- UTF-8 without a byte order mark and without lone surrogates; a size and a depth limit before parsing

`dumps` writes sorted keys without spaces and a final newline, so equal values have equal bytes.

Compact documents, which is how ours are written, are read by orjson: it refuses all of the above but
duplicate keys and large integers, and writes back the document itself only if there were none.
"""

from __future__ import annotations

import json
import math
import re
from itertools import accumulate
from typing import Any

import orjson

from harness.errors import VerificationFailed

LIMIT = 64 << 20
"""Bytes of a document."""
DEPTH = 64
"""Nested arrays and objects."""
LARGEST = 2**53


def loads(data: bytes, *, where: str, limit: int = LIMIT, depth: int = DEPTH) -> Any:
    """The value of ``data``. Raises `VerificationFailed` at ``where`` for what has more than one reading."""
    if len(data) > limit:
        raise VerificationFailed(f"has {len(data)} bytes, more than {limit}", where=where)
    if _nesting(data, depth) > depth:
        raise VerificationFailed(f"is nested deeper than {depth}", where=where)
    try:
        value = orjson.loads(data)
        if orjson.dumps(value, option=orjson.OPT_STRICT_INTEGER) == data.removesuffix(b"\n"):
            return value
    except (orjson.JSONDecodeError, orjson.JSONEncodeError):
        pass  # it is not JSON, or has a large integer: the reason is found below
    return _read(data, where)


def _read(data: bytes, where: str) -> Any:
    """`loads` of whatever is not compact, and the reason why something is refused."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise VerificationFailed(f"is not UTF-8 at byte {error.start}", where=where) from error
    if text.startswith("\ufeff"):
        raise VerificationFailed("begins with a byte order mark", where=where)
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise VerificationFailed(f"is not JSON at character {error.pos}: {error.msg}", where=where) from error
    except (ValueError, RecursionError) as error:
        raise VerificationFailed(str(error), where=where) from error
    if "\\u" in text:
        _refuse_surrogates(value, where)
    return value


def dumps(value: Any) -> bytes:
    """The canonical bytes of ``value``. Raises ValueError for what `loads` would refuse."""
    _check(value, DEPTH)
    return (_ENCODER.encode(value) + "\n").encode("utf-8")


def rewritten(value: Any) -> bytes:
    """`dumps` of what `loads` has read, unless it holds a float: encoders spell those differently."""
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS | orjson.OPT_APPEND_NEWLINE)


def _nesting(data: bytes, enough: int) -> int:
    """The deepest nesting of brackets outside strings; 0 when there are not ``enough`` of them to matter."""
    if data.count(b"[") + data.count(b"{") <= enough:
        return 0
    brackets = _brackets(data)
    return max(accumulate(map(_LEVEL.__getitem__, brackets), initial=0))


def _brackets(data: bytes) -> bytes:
    """The brackets of ``data`` outside its strings; a string that does not end reaches to the end."""
    if b'\\"' not in data and b"\\\\" not in data:
        marks = data.translate(None, _NO_MARKS).replace(b'""', b"")
        # Before a bracket in a string stands an odd number of quotes, and then one of them is left here.
        if b'"' not in marks:
            return marks
    return _STRING.sub(b"", data).translate(None, _NO_BRACKETS)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"has the key `{key}` twice")
            seen.add(key)
    return result


def _refuse_constant(text: str) -> None:
    raise ValueError(f"holds {text}, which is not JSON")


def _small_integer(text: str) -> int:
    if len(text) > 17 or abs(int(text)) > LARGEST:
        raise ValueError(f"holds the integer {text[:20]}, beyond 2**53")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"holds the number {text[:20]}, beyond a double")
    return value


def _refuse_surrogates(value: Any, where: str) -> None:
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise VerificationFailed("holds a lone surrogate", where=where) from error
    elif isinstance(value, list):
        for item in value:
            _refuse_surrogates(item, where)
    elif isinstance(value, dict):
        for key, item in value.items():
            _refuse_surrogates(key, where)
            _refuse_surrogates(item, where)


def _check(value: Any, depth: int) -> None:
    kind = type(value)
    if kind is str or value is None:
        return
    if isinstance(value, dict):
        _check_depth(depth)
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"key {key!r} is not a string")
            if type(item) is not str:
                _check(item, depth - 1)
    elif isinstance(value, list | tuple):
        _check_depth(depth)
        for item in value:
            if type(item) is not str:
                _check(item, depth - 1)
    elif isinstance(value, int) and abs(value) > LARGEST:
        raise ValueError(f"integer {value} is beyond 2**53")


def _check_depth(depth: int) -> None:
    if depth == 0:
        raise ValueError(f"the value is nested deeper than {DEPTH}")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_int=_small_integer, parse_float=_finite
)
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":"))
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_LEVEL = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
_NO_BRACKETS = bytes(set(range(256)) - _LEVEL.keys())
_NO_MARKS = bytes(set(_NO_BRACKETS) - set(b'"'))
