"""One job at a time trains in a run folder: a lock that goes with the process, also at kill -9."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path

from harness.errors import EnvironmentFault
from harness.format import files as durable

WAIT_SECONDS = 5.0
"""For the job that holds the folder. A killed one keeps its lock until its last thread is gone, which takes
moments on a busy machine, and `harness doctor` holds it while it looks."""
_POLL_SECONDS = 0.05


def take(root: Path, say: Callable[[str], None]) -> int:
    """The descriptor that holds the lock of the run folder ``root``, which is made if there is none.

    Raises `EnvironmentFault` when the folder cannot be written, or another job still holds it after
    `WAIT_SECONDS`; ``say`` tells once that it is waited for.
    """
    try:
        durable.make_folder(root)
        descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        probe = root / ".tmp-writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise EnvironmentFault(
            f"the run folder cannot be used: {error.strerror}", where=str(root), remedy="change run.dir"
        ) from error
    deadline = time.monotonic() + WAIT_SECONDS
    waits = False
    while not _is_locked(descriptor):
        if time.monotonic() > deadline:
            os.close(descriptor)
            raise EnvironmentFault(
                "another job is training in this folder",
                where=str(root),
                remedy="wait for it or stop it; a requeued job must start after the old one ended",
            )
        if not waits:
            say(f"run folder    held by another job; waiting up to {WAIT_SECONDS:.0f} s for its end")
            waits = True
        time.sleep(_POLL_SECONDS)
    return descriptor


def _is_locked(descriptor: int) -> bool:
    """Whether this process has the lock now."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
