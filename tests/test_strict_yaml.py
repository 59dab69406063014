"""The strict part of YAML that configs and policies are written in."""

from __future__ import annotations

import math
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from harness import strict_yaml
from harness.errors import ConfigError

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
)
KEYS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=10)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)


@given(VALUES)
def test_what_is_written_is_read_back(value: Any) -> None:
    """Oracle: the value itself, type for type; PyYAML reads the same text, too."""
    text = f"key: {strict_yaml.write(value)}\n"
    assert strict_yaml.write(strict_yaml.read(text, "here").value["key"]) == strict_yaml.write(value)
    assert yaml.safe_load(text)["key"] == value


FRAGMENTS = st.lists(
    st.sampled_from(
        ["a", "b: ", "- ", "{", "}", "[", "]", ",", ":", "\n", "  ", "1e3", "0x1", "&x", "*x", "!!int "]
    )
    | st.sampled_from(
        ["'", '"', "\\", "#", "|", ">", "%", "---", "...", "\t", "\ufeff", "\u2028", "1_0", "<<"]
    ),
    max_size=25,
).map("".join)


@given(st.text(max_size=60) | FRAGMENTS)
def test_any_text_is_a_document_or_one_line_of_error(text: str) -> None:
    """Oracle: no other exception; what is accepted, PyYAML accepts as well."""
    try:
        document = strict_yaml.read(text, "here")
    except ConfigError as error:
        message = str(error)
    else:
        message = "here"
        yaml.load(text, Loader=yaml.BaseLoader)
        assert strict_yaml.write(document.value)
    assert "here" in message
    assert "\n" not in message


READ: dict[str, Any] = {
    "1e-3": 0.001,
    "1.": 1.0,
    ".5": 0.5,
    "-7": -7,
    "+3": 3,
    "0": 0,
    "007": "007",
    "0x10": "0x10",
    "1_000": "1_000",
    "yes": "yes",
    "no": "no",
    "on": "on",
    "True": "True",
    "true": True,
    "null": None,
    "~": None,
    "NULL": "NULL",
    "12:30": "12:30",
    "2026-01-01": "2026-01-01",
    ".inf": ".inf",
    "nan": "nan",
    '"1"': "1",
    "'true'": "true",
}


@pytest.mark.parametrize("text", READ)
def test_plain_words_have_no_hidden_meanings(text: str) -> None:
    """Oracle: the list; booleans, octals, times and dates of YAML 1.1 are strings here."""
    value = strict_yaml.read(f"k: {text}", "here").value["k"]
    assert (value, type(value)) == (READ[text], type(READ[text]))


REFUSED = {
    "twice": ("a: 1\nb: 2\na: 3\n", 3),
    "twice inside": ("a:\n  b: 1\n  b: 2\n", 3),
    "anchor": ("a: &x 1\n", 1),
    "alias": ("a: 1\nb: *x\n", 2),
    "tag": ("a: !!python/object:os.system 1\n", 1),
    "a number as key": ("1: 2\n", 1),
    "two documents": ("a: 1\n---\nb: 2\n", 2),
    "too large an integer": (f"a: {2**53 + 1}\n", 1),
    "too large a float": ("a: 1e999\n", 1),
    "open bracket": ("a: [1, 2\n", 1),
    "tab": ("a:\n\tb: 1\n", 2),
    "deep": ("a: " + "[" * 40 + "]" * 40, 1),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_could_mean_something_else_is_refused_with_its_line(name: str) -> None:
    """Oracle: file and line."""
    text, line = REFUSED[name]
    with pytest.raises(ConfigError) as caught:
        strict_yaml.read(text, "c.yaml")
    place = str(caught.value.where)
    assert place.startswith("c.yaml:")
    assert int(place.rpartition(":")[2]) in (line, line + 1)


def test_lines_of_nested_keys_are_known() -> None:
    """Oracle: counted by hand."""
    lines = strict_yaml.read("a:\n  b: 1\n\n  c: {d: 2}\ne: 3\n", "here").lines
    assert lines == {("a",): 1, ("a", "b"): 2, ("a", "c"): 4, ("a", "c", "d"): 4, ("e",): 5}


def test_a_config_of_any_size_costs_little() -> None:
    """Oracle: the limit."""
    with pytest.raises(ConfigError, match="larger than"):
        strict_yaml.read("a: 1\n" * strict_yaml.LIMIT_BYTES, "here")


@pytest.mark.parametrize("value", [math.nan, math.inf, 2**53 + 1, {1, 2}, b"bytes"])
def test_what_a_config_cannot_hold_is_not_written(value: Any) -> None:
    """Oracle: an error instead of a text that reads as something else."""
    with pytest.raises(ConfigError, match="cannot hold"):
        strict_yaml.write(value)
