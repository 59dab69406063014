"""How far two tensors of the same dtype and shape are apart, from their bytes alone.

- differing elements are counted by their bits, so that +0 and -0 differ and a NaN equals itself
- the distance of two floats is the number of steps between neighbouring values (ULP), by the order of their
  bits read as sign and magnitude; +0 and -0 are 0 apart
- relative L2 is the norm of A - B over the norm of A
- elements that are NaN or infinite on either side have no distance and are counted apart

No numpy: arrays, and loops that run in C (`map`, `math.dist`, `math.hypot`).
"""

from __future__ import annotations

import math
import operator
import struct
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from harness.format.safetensors_header import BITS

FLOATS = ("F64", "F32", "F16", "BF16")
"""Dtypes with a distance; of all others only the differing elements are counted."""

_WORDS = {64: "q", 32: "i", 16: "h", 8: "b"}
"""Type codes of `array` for signed words, by bits."""


@dataclass(frozen=True)
class Distance:
    """How far the elements are apart that were looked at."""

    largest_ulp: int
    relative_l2: float | None
    """None when A is zero everywhere, or the quotient is beyond float64."""
    not_finite: int
    """Differing elements with a NaN or an infinity on either side."""


class Measure:
    """Adds up the distance of two tensors, chunk by chunk."""

    def __init__(self, dtype: str) -> None:
        self._dtype = dtype
        self._word = _WORDS[BITS[dtype]]
        self._ulp = 0
        self._difference = 0.0
        self._norm = 0.0
        self._not_finite = 0

    @property
    def has_distance(self) -> bool:
        """Whether elements of the dtype have one."""
        return self._dtype in FLOATS

    def differing(self, one: bytes, other: bytes) -> int:
        """How many elements of two chunks differ."""
        return sum(map(operator.ne, self._words(one), self._words(other)))

    def first(self, one: bytes, other: bytes) -> int:
        """The index of the first element that differs in two unequal chunks."""
        pairs = zip(self._words(one), self._words(other), strict=True)
        return next(index for index, (left, right) in enumerate(pairs) if left != right)

    def add(self, one: bytes, other: bytes) -> None:
        """Two chunks of whole elements; equal ones count for the norm of A."""
        left = _values(one, self._dtype)
        if one == other:
            self._norm = math.hypot(self._norm, _norm(left))
            return
        right = _values(other, self._dtype)
        keys = [self._keys(one), self._keys(other)]
        if not (math.isfinite(sum(left)) and math.isfinite(sum(right))):
            left, right, keys = self._finite(left, right, keys)
        self._norm = math.hypot(self._norm, _norm(left))
        self._difference = math.hypot(self._difference, math.dist(left, right))
        self._ulp = max(self._ulp, max(map(abs, map(operator.sub, *keys)), default=0))

    def distance(self) -> Distance:
        """Of everything that was added."""
        if not self._difference:
            return Distance(self._ulp, 0.0, self._not_finite)
        relative = self._difference / self._norm if self._norm else math.inf
        return Distance(self._ulp, relative if math.isfinite(relative) else None, self._not_finite)

    def _finite(
        self, left: Sequence[float], right: Sequence[float], keys: list[list[int]]
    ) -> tuple[Sequence[float], Sequence[float], list[list[int]]]:
        """The elements that are finite on both sides; the others are counted when they differ."""
        both = [math.isfinite(one) and math.isfinite(other) for one, other in zip(left, right, strict=True)]
        self._not_finite += sum(
            not finite and one != other for finite, one, other in zip(both, *keys, strict=True)
        )
        kept = [index for index, finite in enumerate(both) if finite]
        return (
            [left[index] for index in kept],
            [right[index] for index in kept],
            [[words[index] for index in kept] for words in keys],
        )

    def _keys(self, data: bytes) -> list[int]:
        """The bits of each element as an integer that grows with its value; -0 and +0 are both 0."""
        lowest = -(1 << BITS[self._dtype] - 1)
        return [word if word >= 0 else lowest - word for word in self._words(data)]

    def _words(self, data: bytes) -> array[int]:
        return _native(array(self._word, data))


def _native(values: array[int]) -> array[int]:
    if sys.byteorder == "big":
        values.byteswap()
    return values


def _values(data: bytes, dtype: str) -> Sequence[float]:
    if dtype == "BF16":
        # A bfloat16 is the upper half of a float32.
        wide = bytearray(2 * len(data))
        wide[2::4], wide[3::4] = data[0::2], data[1::2]
        data, dtype = bytes(wide), "F32"
    letter = {"F64": "d", "F32": "f", "F16": "e"}[dtype]
    return struct.unpack(f"<{len(data) * 8 // BITS[dtype]}{letter}", data)


def _norm(values: Sequence[float]) -> float:
    """Euclidean norm of the finite ones."""
    norm = math.hypot(*values)
    return norm if math.isfinite(norm) else math.hypot(*filter(math.isfinite, values))
