"""`harness.format.strict_json`: one reading for each document, a refusal for everything else."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusal import accepted

from harness.errors import VerificationFailed
from harness.format import strict_json

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20
)
PIECES = [
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    '"',
    '"a"',
    '"a":1',
    "1",
    "-",
    "1e5",
    "1e999",
    ".5",
    "NaN",
    "Infinity",
    "null",
    "true",
    " ",
    "\n",
    "\\",
    "\\ud800",
    '"\\ud83d\\ude00"',
    "9007199254740993",
    "\ufeff",
    "\x00",
]
FRAGMENTS = st.lists(
    st.sampled_from(PIECES),
    max_size=12,
).map("".join)
"""Text near to JSON, where parsers part."""


@given(VALUES)
@settings(deadline=None)
def test_what_is_written_is_read_back_by_us_and_by_others(value: Any) -> None:
    """Oracle: json and orjson, which share no code with the checks."""
    data = strict_json.dumps(value)
    assert strict_json.loads(data, where="x") == json.loads(data) == orjson.loads(data) == value
    assert strict_json.dumps(strict_json.loads(data, where="x")) == data


EXACT = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(EXACT)
@settings(deadline=None)
def test_what_was_read_is_written_back_in_the_same_bytes(value: Any) -> None:
    """Oracle: `dumps`, whose encoder is another one; floats are left out, as the function says."""
    assert strict_json.rewritten(value) == strict_json.dumps(value)


@given(st.dictionaries(st.text(), SCALARS))
@settings(deadline=None)
def test_equal_values_have_equal_bytes(value: dict[str, Any]) -> None:
    """Oracle: the order of keys in memory must not show."""
    turned = dict(reversed(value.items()))
    assert strict_json.dumps(turned) == strict_json.dumps(value)
    assert strict_json.dumps(value).endswith(b"\n")


@given(st.binary(max_size=200) | FRAGMENTS.map(str.encode))
@settings(deadline=None, max_examples=1000)
def test_any_bytes_are_one_value_or_refused(data: bytes) -> None:
    """Oracle: what is accepted means the same to orjson and json; no other exception than ours."""
    for value in accepted(strict_json.loads, data):
        assert orjson.loads(data) == json.loads(data) == value
        assert strict_json.loads(strict_json.dumps(value), where="there") == value


@given(VALUES.map(lambda value: json.dumps(value, ensure_ascii=False, separators=(",", ":"))) | FRAGMENTS)
@settings(deadline=None, max_examples=1000)
def test_a_compact_document_is_read_as_any_other(text: str) -> None:
    """Oracle: the same document with a space before it, which Python's json reads with all our hooks."""
    data = text.encode("utf-8", "surrogatepass")
    compact, other = accepted(strict_json.loads, data), accepted(strict_json.loads, b" " + data)
    if not data.startswith(b"\xef\xbb\xbf"):
        assert list(map(repr, compact)) == list(map(repr, other))


@given(FRAGMENTS)
@settings(deadline=None, max_examples=1000)
def test_what_another_parser_refuses_is_refused(text: str) -> None:
    """Oracle: orjson, a strict RFC 8259 parser."""
    try:
        orjson.loads(text.encode())
    except orjson.JSONDecodeError:
        with pytest.raises(VerificationFailed):
            strict_json.loads(text.encode(), where="x")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'{"a":1,"a":1}', "has the key `a` twice"),
        (b'{"b":{"a":1,"\\u0061":2}}', "has the key `a` twice"),
        (b"NaN", "holds NaN, which is not JSON"),
        (b"[-Infinity]", "holds -Infinity, which is not JSON"),
        (b"1e999", "holds the number 1e999, beyond a double"),
        (b"9007199254740993", "beyond 2**53"),
        (b"-9007199254740993", "beyond 2**53"),
        (b"1" * 5000, "beyond 2**53"),
        (b"\xef\xbb\xbf{}", "begins with a byte order mark"),
        (b'"\xff"', "is not UTF-8 at byte 1"),
        (b'"\\ud800"', "holds a lone surrogate"),
        (b'{"\\udc00":1}', "holds a lone surrogate"),
        (b'"\xed\xa0\x80"', "is not UTF-8"),
        (b"[" * 65 + b"]" * 65, "is nested deeper than 64"),
        (b'{"a":' * 100_000, "is nested deeper than 64"),
        (b"{} {}", "is not JSON at character 3"),
        (b'"\n"', "is not JSON"),
        (b"", "is not JSON"),
    ],
)  # fmt: skip
def test_a_document_with_two_readings_is_refused(data: bytes, reason: str) -> None:
    """Oracle: the rules in the module's docstring; the reason names the rule."""
    with pytest.raises(VerificationFailed, match="there") as refused:
        strict_json.loads(data, where="there")
    assert reason in refused.value.what


def test_the_largest_allowed_document_is_read() -> None:
    """Oracle: limits are inclusive: size, depth and 2**53."""
    data = b"[" * 64 + b"9007199254740992" + b"]" * 64
    assert strict_json.loads(data, where="x", limit=len(data))
    with pytest.raises(VerificationFailed, match=f"has {len(data)} bytes, more than {len(data) - 1}"):
        strict_json.loads(data, where="x", limit=len(data) - 1)


def test_brackets_in_strings_are_no_nesting() -> None:
    """Oracle: json.loads; a tokenizer's merges file is full of brackets."""
    data = json.dumps(["[" * 200, '\\"[' * 200, "\\"]).encode()
    assert strict_json.loads(data, where="x") == json.loads(data)


def deepest(data: bytes) -> int:
    """The deepest nesting of brackets outside strings, a byte at a time."""
    depth = most = 0
    inside = escaped = False
    for byte in data:
        if inside:
            inside, escaped = escaped or byte != ord('"'), byte == ord("\\") and not escaped
        else:
            inside, escaped = byte == ord('"'), False
            depth += (byte in b"[{") - (byte in b"]}")
            most = max(most, depth)
    return most


@settings(max_examples=500)
@given(st.lists(st.sampled_from([*'"\\[]{}a', '"a"', '\\"']), max_size=16).map("".join))
def test_every_text_that_is_nested_too_deeply_is_refused_for_that(text: str) -> None:
    """Oracle: a reader of one byte at a time, which has no short way for texts without escaped quotes."""
    data = b"[" * 64 + text.encode()
    with pytest.raises(VerificationFailed) as refused:  # it does not end: refused either way
        strict_json.loads(data, where="x")
    assert ("is nested deeper" in refused.value.what) == (deepest(data) > 64)


@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), 2**53 + 1, {1: "a"}, {"a": {None: 1}}, ["\ud800"], {"a": [float("-inf")]}],
)
def test_what_would_be_refused_is_not_written(value: Any) -> None:
    """Oracle: ValueError, as documented."""
    with pytest.raises(ValueError, match=r"."):
        strict_json.dumps(value)


def test_a_value_that_is_nested_too_deeply_is_not_written() -> None:
    """Oracle: 64 levels are read back, 65 raise ValueError."""
    value: Any = []
    for _ in range(63):
        value = [value]
    assert strict_json.loads(strict_json.dumps(value), where="x") == value
    with pytest.raises(ValueError, match="nested deeper"):
        strict_json.dumps([value])
