"""Digests of tensors: ``blake3:`` and the hex BLAKE3-256 of a tensor's bytes as stored.

A file's own digest is sha256, which every tool knows. Each tensor's is BLAKE3 (specification at
github.com/BLAKE3-team/BLAKE3-specs): the same bytes are hashed a second time, and a restore that verifies
tensor by tensor is bound by it. On the machine of scripts/bench/README.md it takes 0.45 of sha256's time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Protocol

from blake3 import blake3

PREFIX = "blake3:"


class Span(Protocol):
    """Where a tensor lies in its file."""

    @property
    def start(self) -> int:
        """Offset of its first byte."""

    @property
    def end(self) -> int:
        """Offset after its last byte."""


def tensor_digest(data: bytes | memoryview) -> str:
    """The digest of a tensor's bytes."""
    return PREFIX + blake3(data).hexdigest()


class RunningDigest:
    """The digest of a tensor whose bytes come in pieces."""

    def __init__(self) -> None:
        self._digest = blake3()

    def update(self, piece: memoryview) -> None:
        """The next bytes."""
        self._digest.update(piece)

    def result(self) -> str:
        """The digest of all the bytes so far."""
        return PREFIX + self._digest.hexdigest()


class TensorDigests:
    """The digests of a file's tensors while its bytes go by in order; tensors lie one after the other."""

    def __init__(self, spans: Iterable[Span]) -> None:
        """``spans``: the file's tensors, sorted by start and end."""
        self._pending = deque(spans)
        self._digest = RunningDigest()
        self._results: list[str] = []

    def update(self, offset: int, view: memoryview) -> None:
        """The bytes of the file from ``offset`` on."""
        end = offset + len(view)
        while self._pending and self._pending[0].start <= end:
            span = self._pending[0]
            self._digest.update(view[max(span.start - offset, 0) : max(span.end - offset, 0)])
            if span.end > end:
                return
            self._finish_first()

    def finish(self) -> list[str]:
        """The file has ended: every tensor's digest, in the order of the spans."""
        while self._pending:
            self._finish_first()
        return self._results

    def _finish_first(self) -> None:
        self._pending.popleft()
        self._results.append(self._digest.result())
        self._digest = RunningDigest()
