"""Tokens mapped from disk, and the windows of them that are samples."""

from __future__ import annotations

import hashlib
import mmap
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BufferedReader
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.errors import VerificationFailed
from harness.format import files, safetensors_header
from harness.format.safetensors_header import Header

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
    held: tuple[Mapped, ...] = field(default=(), repr=False)
    """What the arrays are mapped from."""

    def require_unchanged(self) -> None:
        """Raise `VerificationFailed` when a mapped file does not hold any more what was digested."""
        for each in self.held:
            each.require_unchanged()


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


_TICK_NS = 2_000_000_000
"""The coarsest step of a file's times that is in use, FAT's (the `st_mtime` of Python's documentation of
`os.stat_result`)."""


class Mapped:
    """A file that is opened once: what was digested is what is parsed, mapped and trained on.

    Another file that takes its name is never read. What is written into this one does reach the mapping,
    since a corpus is no copy in memory; the kernel then changes the times of the file, which
    `require_unchanged` compares at the price of one fstat. A file that had just been written when it was
    digested is digested again, since its times go by the ticks of a clock.
    """

    def __init__(self, stream: BufferedReader, where: str) -> None:
        """``stream``: the open file, kept open; ``where`` names it. Raises `VerificationFailed` when it is
        empty or changes while it is digested, `EnvironmentFault` when it cannot be mapped."""
        self._stream, self._where = stream, where
        self._stamp, self._settled = self._looked_at()
        if not self._stamp[0]:
            raise VerificationFailed("is empty", where=where)
        self.sha256 = self._digest()
        """Hex, of all its bytes."""
        if self._looked_at()[0] != self._stamp:
            raise VerificationFailed("changed while it was read", where=where, remedy="start again")
        try:
            self._mapping = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:  # it needs one more open file
            raise files.unreadable(error, where) from error

    def header(self) -> Header:
        """Of a safetensors file. Raises as `safetensors_header.read_open`."""
        with self._from_start() as stream:
            return safetensors_header.read_open(stream, where=self._where)

    def array(self, dtype: str, offset: int, count: int) -> Array:
        """``count`` values of ``dtype`` at byte ``offset``, mapped read-only; ``count`` is not 0.

        A plain array, not a numpy.memmap: indexing that is ten times as slow.
        """
        return np.frombuffer(self._mapping, dtype=dtype, count=count, offset=offset)

    def require_unchanged(self) -> None:
        """Raise `VerificationFailed` when the file does not hold any more what was digested."""
        now, settled = self._looked_at()
        if now == self._stamp and self._settled:
            return
        # A new name or other permissions change the times as well: only the bytes tell.
        if now[0] != self._stamp[0] or self._digest() != self.sha256:
            raise VerificationFailed(
                "changed while it was trained on",
                where=self._where,
                remedy="get the file back; the checkpoints before were made with what it held at the start",
            )
        self._stamp, self._settled = now, settled

    def _looked_at(self) -> tuple[files.Stamp, bool]:
        """What changes with the file, and whether another change from now on would show in it."""
        status = os.fstat(self._stream.fileno())
        return files.stamp(status), abs(time.time_ns() - status.st_ctime_ns) > _TICK_NS

    def _digest(self) -> str:
        with self._from_start() as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    def _from_start(self) -> BufferedReader:
        """The open file with an empty buffer: one that is rewound gives again what it has in its buffer,
        whatever the file holds by now."""
        stream = os.fdopen(self._stream.fileno(), "rb", closefd=False)
        stream.seek(0)
        return stream
