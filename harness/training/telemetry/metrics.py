"""metrics.jsonl, one line a step, and events/, one file a rank: the truth that everything else is drawn from.

A resume continues metrics.jsonl at the checkpoint's step. Lines beyond it belong to steps that are about to
be run again; they are moved to events/ as they were, so nothing is lost and no step appears twice.
"""

from __future__ import annotations

import hashlib
import os
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from harness import privacy
from harness.errors import ResumeRefused
from harness.format import files as durable
from harness.format.metrics_line import step_of

_FLUSH_SECONDS = 1.0


class Events:
    """``events/rank-NNNNN.jsonl``: what happened besides steps, each line flushed at once.

    No line names the home folder, the user or the host, though tracebacks do (`harness.privacy`).
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._stream = open(path, "a+b", buffering=0)  # noqa: SIM115
        self._end_partial_line()

    def _end_partial_line(self) -> None:
        """A line that an earlier launch could not finish must not swallow the next one."""
        if self._stream.tell() > 0:
            self._stream.seek(-1, os.SEEK_END)
            if self._stream.read(1) != b"\n":
                self._stream.write(b"\n")

    def write(self, event: str, level: str = "info", **fields: Any) -> None:
        """Append one event; ``level`` is info, warning or error."""
        line = {"time": time.time(), "level": level, "event": event, **fields}
        data = privacy.scrubbed(orjson.dumps(line, default=str).decode()).encode() + b"\n"
        while data:  # an unbuffered write may take a part: a disk that fills up, a limit
            data = data[self._stream.write(data) :]

    def failure(self, error: BaseException) -> None:
        """Append ``error`` with its full traceback."""
        self.write("failure", "error", error=str(error), traceback="".join(traceback.format_exception(error)))

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


class MetricsLog:
    """Appends to metrics.jsonl; lines reach the file at least once a second and at each `flush`."""

    def __init__(self, path: Path) -> None:
        self._stream = open(path, "ab")  # noqa: SIM115
        # The first sync of the file alone would leave its name to a power cut.
        durable.fsync_folder(path.parent)
        self._flushed = time.monotonic()
        self._digest = hashlib.sha256()

    @property
    def digest(self) -> str:
        """Hex sha256 of the lines that this launch has written."""
        return self._digest.hexdigest()

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one step's line."""
        data = orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)
        self._digest.update(data)
        self._stream.write(data)
        now = time.monotonic()
        if now - self._flushed > _FLUSH_SECONDS:
            self._flushed = now
            self._stream.flush()

    def flush(self) -> None:
        """Hand all lines to the operating system."""
        self._stream.flush()

    def sync(self) -> None:
        """Put what was flushed on disk. Safe to call from another thread."""
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Flush, sync and close; a flush that fails still closes."""
        try:
            self._stream.flush()
            self.sync()
        finally:
            self._stream.close()


def rewind(path: Path, step: int, events: Events, *, accept_gap: bool = False) -> int:
    """Cut metrics.jsonl after ``step``; returns the number of lines moved to ``events``.

    Raises `ResumeRefused` when the line of ``step`` is not there, unless ``accept_gap``.
    """
    if not path.exists() and step == 0:
        return 0
    data = path.read_bytes() if path.exists() else b""
    end = len(data)
    moved: list[bytes] = []
    while end:
        start = data.rfind(b"\n", 0, end - 1) + 1
        number = step_of(data[start:end])
        if number is not None and number <= step:
            break
        moved.append(data[start:end])
        end = start
    last = step_of(data[data.rfind(b"\n", 0, end - 1) + 1 : end]) if end else 0
    if last != step and not accept_gap:
        raise ResumeRefused(
            f"metrics.jsonl ends at step {last}, the checkpoint is of step {step}",
            where=str(path),
            remedy="restore the file, or continue with a gap: --accept metrics",
        )
    for line in reversed(moved):
        events.write("superseded metrics", line=line.decode("utf-8", "replace").rstrip("\n"))
    if moved:
        with open(path, "r+b") as stream:
            stream.truncate(end)
            os.fsync(stream.fileno())
    return len(moved)


def read_steps(path: Path, after: int, through: int) -> list[dict[str, Any]]:
    """The lines of steps ``after < step <= through``."""
    lines = []
    with open(path, "rb") as stream:
        for raw in stream:
            number = step_of(raw)
            if number is not None and after < number <= through:
                lines.append(orjson.loads(raw))
    return lines
