"""JSON lines that somebody else may still be writing: whole lines are read, a partial last one waits.

Example::

    tail = Tail(run / "metrics.jsonl")
    tail.read().lines      # everything so far
    tail.read().lines      # what was added since
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path
from typing import Any

import orjson

from harness.errors import EvidenceIncomplete, VerificationFailed
from harness.format.files import open_regular

Line = Mapping[str, Any]
LIMIT = 16 << 20
"""Bytes of a line: a file of one endless line can be made of holes, which take no disk."""


@dataclass(frozen=True)
class Chunk:
    """What one look at a file gave."""

    lines: tuple[Line, ...] = ()
    """Whole lines that hold a JSON object, in order."""
    unreadable: int = 0
    """Whole lines that do not."""
    partial: bool = False
    """Whether the file ends inside a line: it is being written, or its writer was cut off."""
    restarted: bool = False
    """Whether the file was cut or replaced since the last look; ``lines`` then starts from its beginning."""


class Tail:
    """Follows one file of JSON lines. A file that is not there yet reads as empty."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        # The last whole line that was read: a resume cuts the file and writes others over it.
        self._last = b""

    def read(self) -> Chunk:
        """The lines since the last look.

        Raises `VerificationFailed` for what is no regular file, since a pipe or a device in its place would
        never end, and for a line beyond `LIMIT`; `EnvironmentFault` when it cannot be read.
        """
        try:
            stream = open_regular(self._path)
        except EvidenceIncomplete:
            return self._reset()
        with stream:
            restarted = self._changed(stream)
            if restarted:
                self._reset()
            stream.seek(self._offset)
            data = b"".join(self._limited(stream))
        return self._parse(data, restarted)

    def _limited(self, stream: BufferedReader) -> Iterator[bytes]:
        while line := stream.readline(LIMIT + 1):
            if len(line) > LIMIT:
                what, remedy = f"has a line of more than {LIMIT} bytes", "get it from its maker again"
                raise VerificationFailed(what, where=str(self._path), remedy=remedy)
            yield line

    def _changed(self, stream: Any) -> bool:
        """Whether what was read before is no longer what the file holds there."""
        if self._offset == 0:
            return False
        stream.seek(self._offset - len(self._last))
        return bool(stream.read(len(self._last)) != self._last)

    def _reset(self) -> Chunk:
        restarted = self._offset > 0
        self._offset, self._last = 0, b""
        return Chunk(restarted=restarted)

    def _parse(self, data: bytes, restarted: bool) -> Chunk:
        end = data.rfind(b"\n") + 1
        if end:
            self._offset += end
            self._last = data[data.rfind(b"\n", 0, end - 1) + 1 : end]
        return replace(parsed(data), restarted=restarted)


def parsed(data: bytes) -> Chunk:
    """The whole lines of ``data``."""
    end = data.rfind(b"\n") + 1
    values = [_object(line) for line in data[:end].splitlines()]
    lines = tuple(value for value in values if value is not None)
    return Chunk(lines, len(values) - len(lines), end < len(data))


def read_all(path: Path) -> Chunk:
    """The whole file as it is now."""
    return Tail(path).read()


def _object(line: bytes) -> Line | None:
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None
