"""The points of a curve, thinned and smoothed before it is drawn."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate

Point = tuple[float, float]

LIMIT = 1e30
"""A value beyond it is named, not drawn: it would flatten everything else."""
BINS = 360
"""A curve of more points than twice this is drawn by the lowest and highest value of each bin."""


def thin(points: Sequence[Point], bins: int = BINS) -> list[Point]:
    """``points`` thinned to the lowest and highest of each of ``bins`` columns; gaps are kept."""
    if len(points) <= 2 * bins:
        return list(points)
    size = len(points) / bins
    kept: list[Point] = []
    for column in range(bins):
        members = points[round(column * size) : round((column + 1) * size)]
        broken = [point for point in members if not drawable(point[1])]
        finite = [point for point in members if drawable(point[1])]
        extremes = {min(finite, key=_height), max(finite, key=_height)} if finite else set()
        kept += sorted({*extremes, *broken[:1]})
    return kept


def trailing_mean(points: Sequence[Point], window: int) -> tuple[Point, ...]:
    """Each value replaced by the mean of the last ``window`` finite ones; what is not finite stays."""
    finite = [y for _, y in points if math.isfinite(y)]
    means = iter(_window_means(finite, window))
    return tuple((x, next(means) if math.isfinite(y) else y) for x, y in points)


def drawable(value: float) -> bool:
    """Whether ``value`` is drawn rather than named."""
    return math.isfinite(value) and abs(value) <= LIMIT


def _window_means(values: Sequence[float], window: int) -> Iterator[float]:
    """Means of the last ``window`` values at each place, in one pass.

    The values fall into blocks of ``window``; a window is the end of one block and the beginning of the next,
    so nothing is ever subtracted and one huge value does not blur those after it.
    """
    ends = [0.0] * (window + 1)  # what the block before still gives at each place of this one
    for start in range(0, len(values), window):
        block = [value / window for value in values[start : start + window]]
        begun = 0.0
        for place, part in enumerate(block):
            begun += part
            share = (place + 1) / window if start == 0 else 1.0
            yield (ends[place + 1] + begun) / share
        ends = [*reversed([*accumulate(reversed(block))]), 0.0]


def _height(point: Point) -> float:
    return point[1]
