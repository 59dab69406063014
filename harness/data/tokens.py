"""Tokens mapped from disk, and the windows of them that are samples."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
"""1-D, unsigned, mapped from disk."""


@dataclass(frozen=True)
class Counted:
    """Of chats: which tokens count in the loss."""

    train: tuple[Array, ...]
    """0 or 1 for each token, array by array."""
    held_out: tuple[Array, ...]
    end: int
    """The end of document, which stands before, between and after chats."""
    template: bytes
    """The Jinja template that chats were written with."""

    @property
    def template_sha256(self) -> str:
        """Its digest."""
        return hashlib.sha256(self.template).hexdigest()


@dataclass(frozen=True)
class TokenData:
    """The tokens of a run and what they were made of. No sample crosses from one array to the next."""

    train: tuple[Array, ...]
    held_out: tuple[Array, ...]
    held_out_bytes: tuple[Array, ...] | None
    """Bytes of text of each held-out token; None when unknown (token shards without them)."""
    vocabulary: int
    corpus: str
    """Hex sha256 of the corpus."""
    tokenizer: str | None
    """Hex sha256 of the tokenizer; None when token shards do not name it."""
    tokenizer_file: bytes | None
    """The tokenizer.json, if there is one."""
    counts: Mapping[str, int]
    files: Mapping[str, str] = field(repr=False)
    """Name to hex sha256 of the corpus' files."""
    counted: Counted | None = None
    """Of a corpus of chats; None for text, of which every token counts."""


class Windows:
    """Windows of ``length`` + 1 tokens, each starting ``length`` after the one before.

    The last token of a window is the first of the next, so every token but an array's first is predicted
    once. What does not fill a window at an array's end is left out.
    """

    def __init__(self, arrays: tuple[Array, ...], length: int) -> None:
        self.length = length
        self._views = [_windows(array, length) for array in arrays if len(array) > length]
        self._ends = np.cumsum([len(view) for view in self._views], dtype=np.int64)
        self.count = int(self._ends[-1]) if self._views else 0

    def gather(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """The windows ``indices``, int64 (len(indices), length + 1)."""
        if len(self._views) == 1:
            return self._views[0][indices].astype(np.int64)
        rows = np.empty((len(indices), self.length + 1), dtype=np.int64)
        for row, index in enumerate(indices):
            number = int(np.searchsorted(self._ends, index, side="right"))
            view = self._views[number]
            rows[row] = view[index - self._ends[number] + len(view)]
        return rows


def _windows(array: Array, length: int) -> Array:
    """A view (count, length + 1) of overlapping windows; nothing is copied."""
    windows: Array = np.lib.stride_tricks.sliding_window_view(array, length + 1)[::length]
    return windows


def map_array(path: Path, dtype: str, offset: int, count: int) -> Array:
    """``count`` values of ``dtype`` at byte ``offset`` of a file, mapped read-only; ``count`` is not 0.

    A plain array, not a numpy.memmap: indexing that is ten times as slow.
    """
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return np.frombuffer(mapped, dtype=dtype, count=count, offset=offset)
