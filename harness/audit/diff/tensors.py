"""The tensors of two checkpoint folders, compared by the bytes in their files; no manifest is asked.

A tensor is named by its part (``model``, ``optimizer``, ``rng``, ``other``) and its name, whichever file of
the part holds it, so that another number of shards is no difference; RNG states are named with their rank.
Equal bytes are all that "equal" means. What differs is measured (`harness.audit.diff.ulp`) up to a limit of
elements a tensor; differing elements are always all counted.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from harness.audit.diff.ulp import Distance, Measure
from harness.errors import EvidenceIncomplete, VerificationFailed
from harness.format import files, safetensors_header
from harness.format.files import Stamp
from harness.format.safetensors_header import BITS, TensorSpan

PARTS = ("model", "optimizer", "other", "rng")
"""In the order in which they are compared."""

_CHUNK = 1 << 20
"""Bytes of one read of each side; a multiple of every element's size."""
_RANK = re.compile(r"rng-(rank-\d+)\.safetensors")


@dataclass(frozen=True)
class Place:
    """Where one side's tensor lies."""

    file: Path
    span: TensorSpan
    stamp: Stamp
    """Of the file, when its header was read."""


Key = tuple[str, str]
"""Part and name."""


@dataclass(frozen=True)
class Difference:
    """A tensor that is not the same on both sides."""

    part: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    reason: str
    """``values``, or why there is nothing to measure: ``only in A``, ``dtype …``, ``shape …``."""
    elements: int
    differing: int | None = None
    """Elements with other bits; None when values were not compared."""
    first: tuple[int, ...] | None = None
    """Index of the first of them."""
    distance: Distance | None = None
    """None for dtypes without one."""
    measured: int = 0
    """Elements that `distance` covers: from the chunk of the first difference on, then those before it."""


@dataclass(frozen=True)
class Compared:
    """The verdict on two folders."""

    counts: Mapping[str, int]
    """Part → tensors of either side."""
    bytes_compared: int
    differences: tuple[Difference, ...]

    @property
    def tensors(self) -> int:
        """Tensors of either side."""
        return sum(self.counts.values())


@dataclass(frozen=True)
class Folder:
    """The tensors in one folder."""

    path: Path
    places: Mapping[Key, Place]

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(place.span.end - place.span.start for place in self.places.values())


def read(path: Path) -> Folder:
    """The headers of every safetensors file in ``path``.

    Raises `EvidenceIncomplete` when there is no tensor (a pruned checkpoint), `VerificationFailed` for a
    broken header or a name that two files of a part hold, `EnvironmentFault` for what may not be read.
    """
    places: dict[Key, Place] = {}
    try:
        names = sorted(name for name in os.listdir(path) if name.endswith(".safetensors"))
    except OSError as error:
        raise files.unreadable(error, str(path)) from error
    for file in (path / name for name in names):
        stamp = files.stamp(file.lstat())
        for span in safetensors_header.read_header(file).tensors:
            key = _key(file.name, span.name)
            if key in places:
                raise VerificationFailed(f"tensor `{span.name}` is in two files", where=str(file))
            places[key] = Place(file, span, stamp)
    if not places:
        raise EvidenceIncomplete(
            "holds no tensor", where=str(path), remedy="choose a checkpoint that still has its payload"
        )
    order = sorted(places, key=lambda key: PARTS.index(key[0]))
    return Folder(path, {key: places[key] for key in order})


def compare(one: Folder, other: Folder, limit: int, advance: Callable[[int], None]) -> Compared:
    """Compare every tensor; at most ``limit`` elements of a differing one are measured.

    ``advance`` is told the bytes of each side that are done. Raises `VerificationFailed` for a file that ends
    before its header says, and for one that has changed since its header was read: whatever was verified in
    between is what was compared.
    """
    keys = [*one.places, *(key for key in other.places if key not in one.places)]
    keys.sort(key=lambda key: PARTS.index(key[0]))
    differences: list[Difference] = []
    compared = 0
    with _Files() as opened:
        for key in keys:
            pair = one.places.get(key), other.places.get(key)
            differences += _compare(key, *pair, opened, limit)
            compared += min(0 if place is None else place.span.end - place.span.start for place in pair)
            advance(sum(place.span.end - place.span.start for place in pair if place is not None))
        opened.require_unchanged()
    counts = {part: sum(key[0] == part for key in keys) for part in PARTS}
    return Compared({part: count for part, count in counts.items() if count}, compared, tuple(differences))


def _key(file: str, name: str) -> Key:
    rank = _RANK.fullmatch(file)
    if rank is not None:
        return "rng", f"{rank[1]}/{name}"
    part = next((part for part in ("model", "optimizer") if re.match(rf"{part}[-.]", file)), None)
    return (part, name) if part is not None else ("other", f"{file}/{name}")


class _Files(ExitStack):
    """Each file opened once, without following links."""

    def __init__(self) -> None:
        super().__init__()
        self._open: dict[Path, tuple[int, Stamp]] = {}

    def require_unchanged(self) -> None:
        """Raise `VerificationFailed` unless each file is the one whose header was read."""
        for path, (descriptor, stamp) in self._open.items():
            if files.stamp(os.fstat(descriptor)) != stamp:
                raise VerificationFailed(
                    "changed while it was compared", where=str(path), remedy="compare copies of your own"
                )

    def read(self, place: Place, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset`` of the tensor on."""
        if place.file not in self._open:
            try:
                descriptor = os.open(place.file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except OSError as error:
                what = f"cannot be opened: {error.strerror}"
                raise VerificationFailed(what, where=str(place.file)) from error
            self._open[place.file] = (descriptor, place.stamp)
            self.callback(os.close, descriptor)
        descriptor, _ = self._open[place.file]
        data = os.pread(descriptor, length, place.span.start + offset)
        if len(data) != length:
            raise VerificationFailed("ends before its header says", where=str(place.file))
        return data


def _compare(
    key: Key, one: Place | None, other: Place | None, opened: _Files, limit: int
) -> Iterator[Difference]:
    """Nothing when the tensors are equal."""
    if one is None or other is None:
        place = one or other
        if place is not None:
            yield _unlike(key, place.span, "only in A" if other is None else "only in B")
    elif one.span.dtype != other.span.dtype:
        yield _unlike(key, one.span, f"dtype {one.span.dtype} in A, {other.span.dtype} in B")
    elif one.span.shape != other.span.shape:
        yield _unlike(key, one.span, f"shape {list(one.span.shape)} in A, {list(other.span.shape)} in B")
    else:
        yield from _compare_values(key, one, other, opened, limit)


def _unlike(key: Key, span: TensorSpan, reason: str) -> Difference:
    return Difference(*key, span.dtype, span.shape, reason, math.prod(span.shape))


def _compare_values(key: Key, one: Place, other: Place, opened: _Files, limit: int) -> Iterator[Difference]:
    span, width = one.span, BITS[one.span.dtype] // 8
    size = span.end - span.start
    start = next((piece[0] for piece in _pairs(one, other, opened, 0, size) if piece[1] != piece[2]), None)
    if start is None:
        return
    measure = Measure(span.dtype)
    differing, measured, first = 0, 0, 0
    for offset, left, right in _pairs(one, other, opened, start, size):
        if offset == start:
            first = offset // width + measure.first(left, right)
        differing += measure.differing(left, right) if left != right else 0
        measured += _measure(measure, left, right, width, limit - measured)
    # What lies before is equal: it has no distance, and its norm belongs to that of A.
    for _, left, right in _pairs(one, other, opened, 0, start):
        measured += _measure(measure, left, right, width, limit - measured)
    distance = measure.distance() if measure.has_distance else None
    elements, place = math.prod(span.shape), _index(first, span.shape)
    yield Difference(*key, span.dtype, span.shape, "values", elements, differing, place, distance, measured)


def _pairs(
    one: Place, other: Place, opened: _Files, start: int, end: int
) -> Iterator[tuple[int, bytes, bytes]]:
    """Offset in the tensor and the bytes of both sides, in chunks."""
    for offset in range(start, end, _CHUNK):
        length = min(_CHUNK, end - offset)
        yield offset, opened.read(one, offset, length), opened.read(other, offset, length)


def _measure(measure: Measure, left: bytes, right: bytes, width: int, room: int) -> int:
    """Measure the first ``room`` elements; returns how many these were."""
    if not measure.has_distance or room <= 0:
        return 0
    measure.add(left[: room * width], right[: room * width])
    return min(len(left) // width, room)


def _index(flat: int, shape: Sequence[int]) -> tuple[int, ...]:
    """Index in a row-major tensor of ``shape`` of its element number ``flat``."""
    index: list[int] = []
    for length in reversed(shape):
        flat, place = divmod(flat, length)
        index.append(place)
    return tuple(reversed(index))
