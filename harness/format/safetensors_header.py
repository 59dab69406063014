"""The safetensors header, strictly (https://github.com/huggingface/safetensors, "Format").

A file is 8 bytes of little-endian header size, that many bytes of JSON, and the tensors' bytes. The reference
implementation (0.8.0) accepts duplicate names with equal offsets, unknown fields, NUL in names and names that
differ only by Unicode normalisation; here each of them is refused, since two readers could see two models.
"""

from __future__ import annotations

import math
import os
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from harness.errors import VerificationFailed
from harness.format import strict_json
from harness.format.files import open_regular

HEADER_LIMIT = 100_000_000
"""Bytes of a header; the limit of the reference implementation."""

BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
}  # fmt: skip
"""Bits of one element, by dtype."""

DIMENSIONS = 64
"""Most dimensions of a tensor; PyTorch allows as many."""

_FIELDS = {"dtype", "shape", "data_offsets"}


class TensorSpan(NamedTuple):
    """One tensor of a file; ``start`` and ``end`` are offsets in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a header says, tensors in order of offset."""

    tensors: tuple[TensorSpan, ...]
    metadata: Mapping[str, str]
    data_start: int
    """Offset of the first tensor's first byte."""


def parse(prefix: bytes, size: int, *, where: str) -> Header:
    """The header of a file of ``size`` bytes that begins with ``prefix`` (at least the whole header).

    Raises `VerificationFailed` for anything the module's docstring names, holes, overlaps, and sizes that
    do not agree.
    """
    length = header_length(prefix[:8], size, where=where)
    text = prefix[8 : 8 + length].rstrip(b" ")
    document = strict_json.loads(text, where=where, limit=HEADER_LIMIT)
    if not isinstance(document, dict):
        raise VerificationFailed("has a header that is no JSON object", where=where)
    if not text.startswith(b"{") or not text.endswith(b"}"):
        raise VerificationFailed("has a header that is padded otherwise than with spaces behind", where=where)
    metadata = _metadata(document.pop("__metadata__", {}), where)
    start = 8 + length
    spans = [_span(name, entry, start, where) for name, entry in document.items()]
    spans.sort(key=lambda span: (span.start, span.end, span.name))
    end = start
    for span in spans:
        if span.start != end:
            what = "overlaps the tensor before it" if span.start < end else f"leaves a hole at byte {end}"
            raise VerificationFailed(f"tensor `{span.name}` {what}", where=where)
        end = span.end
    if end != size:
        raise VerificationFailed(f"has {size} bytes, its header describes {end}", where=where)
    return Header(tuple(spans), metadata, start)


def header_length(first: bytes, size: int, *, where: str) -> int:
    """The length that the ``first`` 8 bytes of a file of ``size`` bytes announce, checked."""
    if len(first) < 8 or size < 8:
        raise VerificationFailed("is too short for a safetensors header", where=where)
    length = int.from_bytes(first, "little")
    if length > HEADER_LIMIT or length > size - 8:
        raise VerificationFailed(f"announces a header of {length} bytes", where=where)
    return length


def read_header(path: Path) -> Header:
    """The header of the file ``path``; reads nothing behind it. Raises as `parse` and `open_regular`."""
    with open_regular(path) as stream:
        return read_open(stream, where=str(path))


def read_open(stream: BinaryIO, *, where: str) -> Header:
    """The header of the open file ``stream``, from where it stands, its beginning. Raises as `parse`."""
    size = os.fstat(stream.fileno()).st_size
    first = stream.read(8)
    return parse(first + stream.read(header_length(first, size, where=where)), size, where=where)


def build(
    tensors: Sequence[tuple[str, str, Sequence[int]]], metadata: Mapping[str, str], *, alignment: int = 4096
) -> tuple[bytes, list[TensorSpan]]:
    """Header bytes for ``tensors`` (name, dtype, shape) laid out in this order without holes.

    The JSON is padded with spaces, which the format allows, so that the first tensor starts on ``alignment``.
    """
    document: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    offsets = []
    for name, dtype, shape in tensors:
        end = offset + math.prod(shape) * BITS[dtype] // 8
        document[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offsets.append((offset, end))
        offset = end
    text = strict_json.dumps(document).rstrip(b"\n")
    length = -(-(8 + len(text)) // alignment) * alignment - 8
    start = 8 + length
    spans = [
        TensorSpan(name, dtype, tuple(shape), start + begin, start + end)
        for (name, dtype, shape), (begin, end) in zip(tensors, offsets, strict=True)
    ]
    return length.to_bytes(8, "little") + text.ljust(length), spans


def _metadata(value: Any, where: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise VerificationFailed("has metadata that is not strings by name", where=where)
    return value


def _span(name: str, entry: Any, start: int, where: str) -> TensorSpan:
    check_name(name, where)
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        raise VerificationFailed(f"tensor `{name}` has other fields than {sorted(_FIELDS)}", where=where)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise VerificationFailed(f"tensor `{name}` has the unknown dtype {dtype!r}", where=where)
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise VerificationFailed(f"tensor `{name}` has a broken shape or offsets", where=where)
    if len(shape) > DIMENSIONS:
        raise VerificationFailed(f"tensor `{name}` has {len(shape)} dimensions", where=where)
    if math.prod(shape) * BITS[dtype] != (offsets[1] - offsets[0]) * 8:
        raise VerificationFailed(f"tensor `{name}` has offsets that do not fit its shape", where=where)
    return TensorSpan(name, dtype, tuple(shape), start + offsets[0], start + offsets[1])


def check_name(name: str, where: str) -> None:
    """Raise `VerificationFailed` for a tensor name that two readers could take for two names."""
    if not _is_safe(name):
        raise VerificationFailed(f"has the unsafe tensor name {name!r}", where=where)


@lru_cache(16384)  # the checkpoints of a run have the same names
def _is_safe(name: str) -> bool:
    return bool(name) and name.isprintable() and unicodedata.normalize("NFC", name) == name


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and not [item for item in value if type(item) is not int or item < 0]
