"""Chats packed into samples.

The rule: a row has whole chats, as many as fit, in the order of the shard; it begins with an end of document,
each chat is followed by one, and the rest of the row is filled with more that nobody counts. A chat is never
cut: one that is longer than a row is an error. Chats of a row see those before them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from harness.data.tokens import Array, Counted
from harness.errors import ConfigError


@dataclass(frozen=True)
class Turn:
    """The last answer of a chat, and what comes before it."""

    prompt: NDArray[np.int64]
    """Begins with an end of document."""
    answer: NDArray[np.int64]
    """Without the end of document."""


class Rows:
    """Rows of ``length`` + 1 tokens out of ``arrays``, whose tokens ``counted.masks`` says to count.

    Raises `ConfigError` when a chat is longer than a row.
    """

    def __init__(
        self, arrays: tuple[Array, ...], counted: Counted, masks: tuple[Array, ...], length: int
    ) -> None:
        self.length = length
        self._arrays, self._masks, self._end = arrays, masks, counted.end
        spans = [
            (number, start, stop)
            for number, array in enumerate(arrays)
            for start, stop in _packed(np.flatnonzero(array == counted.end), length)
        ]
        self._spans = np.array(spans, dtype=np.int64).reshape(-1, 3)
        self.count = len(spans)

    def gather(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """The rows ``indices``: tokens (len(indices), length + 1), and which of them count in the loss."""
        tokens = np.full((len(indices), self.length + 1), self._end, dtype=np.int64)
        counts = np.zeros(tokens.shape, dtype=np.bool_)
        for row, (number, start, stop) in enumerate(self._spans[indices]):
            tokens[row, : stop - start] = self._arrays[number][start:stop]
            counts[row, : stop - start] = self._masks[number][start:stop]
        return tokens, counts

    def sizes(self, bytes_of: tuple[Array, ...], indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Bytes of text of the counted tokens of the rows ``indices``."""
        return np.array(
            [
                int(bytes_of[number][start:stop][self._masks[number][start:stop] == 1].sum())
                for number, start, stop in self._spans[indices]
            ],
            dtype=np.int64,
        )


def turns(arrays: tuple[Array, ...], masks: tuple[Array, ...], end: int) -> Iterator[Turn]:
    """The last turn of every chat that ends with an answer, in order."""
    for array, mask in zip(arrays, masks, strict=True):
        for start, stop in itertools.pairwise(np.flatnonzero(array == end).tolist()):
            if mask[stop]:
                asked = np.flatnonzero(mask[start + 1 : stop] == 0)
                first = start + 1 + (int(asked[-1]) + 1 if len(asked) else 0)
                yield Turn(array[start:first].astype(np.int64), array[first:stop].astype(np.int64))


def _packed(ends: NDArray[np.int64], length: int) -> Iterator[tuple[int, int]]:
    """Start and stop of each row; ``ends``: places of the ends of documents, of which the first begins."""
    place = 0
    while place + 1 < len(ends):
        last = int(np.searchsorted(ends, ends[place] + length, side="right")) - 1
        if last == place:
            raise ConfigError(
                f"a chat has {int(ends[place + 1] - ends[place])} tokens, a sample {length}",
                remedy="raise data.sequence_length, or prepare the corpus with a lower filters.max_bytes",
            )
        yield int(ends[place]), int(ends[last]) + 1
        place = last
