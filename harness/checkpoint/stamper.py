"""Timestamps of the log's head while a run trains: one request at a time, behind everything else.

A head that could not be timestamped is said in one line and left: the next head holds its records, so the
next timestamp covers them too. Neither training nor a save ever waits for the authority; the end of a run
does, for as long as one request may take.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from harness.errors import HarnessError
from harness.provenance.transparency import timestamp, timestamp_client
from harness.provenance.transparency.log import Head


@dataclass
class Stamper:
    """Has the heads of one log timestamped; on rank 0."""

    folder: Path
    """Of the log."""
    url: str
    seconds: float
    """For one request."""
    warn: Callable[[str], None]
    """Called in the thread that asks."""
    _wanted: Head | None = None
    """The newest head that nobody has asked for."""
    _thread: threading.Thread | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def stamp(self, head: Head | None) -> None:
        """Have ``head`` timestamped, unless it is; one that still waits for its turn gives way to it."""
        if head is None or (self.folder / timestamp.path_of(head.size)).exists():
            return
        with self._lock:
            self._wanted = head
            if self._thread is None:
                # A daemon: whatever an authority does, the process can leave.
                self._thread = threading.Thread(target=self._work, name="timestamps", daemon=True)
                self._thread.start()

    def finish(self) -> None:
        """Wait for what is asked for, no longer than one request may take."""
        thread = self._thread
        if thread is not None:
            thread.join(self.seconds)
            if thread.is_alive():
                self.warn(f"no timestamp yet: {self.url}; the run does not wait for it any longer")

    def _work(self) -> None:
        while True:
            with self._lock:
                head, self._wanted = self._wanted, None
                if head is None:
                    self._thread = None
                    return
            try:
                timestamp_client.write(self.folder, head, self.url, seconds=self.seconds)
            except HarnessError as error:
                self.warn(f"the log's head of {head.size} records has no timestamp: {error}")
