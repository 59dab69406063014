"""`harness.format.safetensors_header`, beside the safetensors package (Rust), which is laxer."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from refusal import accepted
from safetensors.numpy import save

from harness.errors import EvidenceIncomplete, VerificationFailed
from harness.format import safetensors_header as header

NAMES = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=8)
DTYPES = st.sampled_from(["F32", "F64", "F16", "I64", "I32", "U8", "BOOL"])
SHAPES = st.lists(st.integers(0, 4), max_size=3)
NUMPY = {"F32": "<f4", "F64": "<f8", "F16": "<f2", "I64": "<i8", "I32": "<i4", "U8": "u1", "BOOL": "?"}
TENSOR = {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}

Layout = list[tuple[str, str, list[int]]]
LAYOUTS = st.lists(st.tuples(NAMES, DTYPES, SHAPES), max_size=6, unique_by=lambda each: each[0])


def file_of(text: bytes, body: bytes = bytes(12)) -> bytes:
    """A safetensors file with the header ``text``."""
    return len(text).to_bytes(8, "little") + text + body


def parse(data: bytes) -> header.Header:
    """Our reading of a whole file in memory."""
    return header.parse(data, len(data), where="there")


def as_reference(data: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    """The reading of the safetensors package."""
    found = safetensors.deserialize(data)
    return {name: (each["dtype"], list(each["shape"]), bytes(each["data"])) for name, each in found}


def as_ours(data: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    """Our reading, in the same form."""
    return {
        span.name: (span.dtype, list(span.shape), data[span.start : span.end]) for span in parse(data).tensors
    }


@given(LAYOUTS, st.dictionaries(NAMES, st.text(max_size=5), max_size=3), st.sampled_from([8, 64, 4096]))
@settings(deadline=None)
def test_a_header_that_is_built_is_read_alike_by_both(
    layout: Layout, metadata: dict[str, str], alignment: int
) -> None:
    """Oracle: the safetensors package reads the same names, dtypes, shapes and bytes."""
    data, spans = header.build(layout, metadata, alignment=alignment)
    assert len(data) % alignment == 0
    size = sum(math.prod(shape) * header.BITS[dtype] // 8 for _, dtype, shape in layout)
    whole = data + os.urandom(size)
    assert as_ours(whole) == as_reference(whole)
    assert sorted(parse(whole).tensors, key=str) == sorted(spans, key=str)
    assert parse(whole).metadata == metadata
    assert [span.name for span in spans] == [name for name, _, _ in layout]


@given(LAYOUTS)
@settings(deadline=None)
def test_a_file_of_the_reference_is_read_alike(layout: Layout) -> None:
    """Oracle: what safetensors.numpy saves and its own reader says of it."""
    arrays = {name: np.zeros(shape, NUMPY[dtype]) for name, dtype, shape in layout}
    data = save(arrays)
    assert as_ours(data) == as_reference(data)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A good file with some changes in header or length."""
    document = draw(
        st.sampled_from([{"a": TENSOR}, {"a": TENSOR, "b": {**TENSOR, "data_offsets": [12, 24]}}, {}])
    )
    text = json.dumps({"__metadata__": {"k": "v"}, **document}).encode()
    data = bytearray(file_of(text, bytes(12 * len(document))))
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(data) - 1))
        kind = draw(st.sampled_from(["replace", "insert", "delete"]))
        character = draw(st.sampled_from(list(b'0123456789{}[]",:aF \n\0\xff\\')))
        if kind == "replace":
            data[place] = character
        elif kind == "insert":
            data.insert(place, character)
        elif len(data) > 1:
            del data[place]
    return bytes(data)


@given(mutated() | st.binary(max_size=64))
@settings(deadline=None, max_examples=1500)
def test_any_file_is_read_as_the_reference_reads_it_or_refused(data: bytes) -> None:
    """Oracle: the safetensors package accepts whatever we accept, with the same meaning."""
    if accepted(header.parse, data, len(data)):
        assert as_ours(data) == as_reference(data)


@pytest.mark.parametrize(
    ("text", "body", "reason"),
    [
        (b'{"a":%s,"a":%s}' % ((json.dumps(TENSOR).encode(),) * 2), 12, "has the key `a` twice"),
        (b'{"__metadata__":{"k":"1","k":"2"}}', 0, "has the key `k` twice"),
        ({"a": TENSOR, "b": TENSOR}, 12, "overlaps the tensor before it"),
        ({"a": {**TENSOR, "data_offsets": [4, 16]}}, 16, "leaves a hole"),
        ({"a": TENSOR}, 16, "its header describes"),
        ({"a": TENSOR}, 8, "its header describes"),
        ({"a": {**TENSOR, "dtype": "F31"}}, 12, "has the unknown dtype 'F31'"),
        ({"a": {**TENSOR, "dtype": ["F32"]}}, 12, "has the unknown dtype"),
        ({"a": {**TENSOR, "shape": [4]}}, 12, "offsets that do not fit its shape"),
        ({"a": {**TENSOR, "shape": [True, 3]}}, 12, "broken shape"),
        ({"a": {**TENSOR, "shape": [-3]}}, 12, "broken shape"),
        ({"a": {**TENSOR, "shape": [3.0]}}, 12, "broken shape"),
        ({"a": {**TENSOR, "data_offsets": [12, 0]}}, 12, "broken shape or offsets"),
        ({"a": {**TENSOR, "shape": [2**52] * 64}}, 12, "offsets that do not fit its shape"),
        ({"a": {**TENSOR, "shape": [1] * 65}}, 12, "has 65 dimensions"),
        ({"a": {**TENSOR, "extra": 1}}, 12, "has other fields than"),
        ({"a": [TENSOR]}, 12, "has other fields than"),
        ({"a\0": TENSOR}, 12, "unsafe tensor name"),
        ({"": TENSOR}, 12, "unsafe tensor name"),
        ({"a\u0308": TENSOR}, 12, "unsafe tensor name"),
        ({"__metadata__": {"k": 1}}, 0, "metadata that is not strings"),
        ({"__metadata__": []}, 0, "metadata that is not strings"),
        (b"[]", 0, "no JSON object"),
        (b" {}", 0, "padded otherwise than with spaces"),
        (b"{}\n", 0, "padded otherwise than with spaces"),
    ],
)  # fmt: skip
def test_a_header_with_two_readings_is_refused(text: Any, body: int, reason: str) -> None:
    """Oracle: the module's docstring; the reason names the rule."""
    encoded = text if isinstance(text, bytes) else json.dumps(text).encode()
    with pytest.raises(VerificationFailed) as refused:
        parse(file_of(encoded, bytes(body)))
    assert reason in refused.value.what


def test_the_reference_reads_a_doubled_name_without_a_word() -> None:
    """Oracle: safetensors 0.8.0; the day it refuses, the docstring of the module is out of date."""
    one = json.dumps(TENSOR)
    text = f'{{"a":{one},"a":{one.replace("F32", "I32")}}}'.encode()
    assert as_reference(file_of(text))["a"][0] == "I32"


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 100_000_001, 13])
def test_a_header_longer_than_its_file_is_refused_before_it_is_read(length: int) -> None:
    """Oracle: 20 bytes of file hold at most 12 bytes of header."""
    with pytest.raises(VerificationFailed, match=f"announces a header of {length} bytes"):
        header.parse(length.to_bytes(8, "little") + b"{}          ", 20, where="there")


def test_a_header_is_read_from_a_file_without_its_body(tmp_path: Path) -> None:
    """Oracle: a sparse file of a terabyte is read at once."""
    data, spans = header.build([("a", "F32", [2**38])], {})
    path = tmp_path / "large.safetensors"
    path.write_bytes(data)
    os.truncate(path, spans[0].end)
    assert header.read_header(path).tensors == tuple(spans)


def test_a_link_and_a_missing_file_are_told_apart(tmp_path: Path) -> None:
    """Oracle: absent evidence is exit code 4, wrong evidence 1."""
    with pytest.raises(EvidenceIncomplete, match="is missing"):
        header.read_header(tmp_path / "none")
    (tmp_path / "link").symlink_to("none")
    with pytest.raises(VerificationFailed, match="is a symbolic link"):
        header.read_header(tmp_path / "link")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(VerificationFailed, match="is not a regular file"):
        header.read_header(tmp_path / "pipe")
