"""SIGTERM, SIGINT and SIGUSR1 ask a run or a sweep to stop: it saves at the next step and exits 75."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

SCHEDULER_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
STOP_SIGNALS = (*SCHEDULER_SIGNALS, signal.SIGINT)

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class StopRequest:
    """The first stop signal that reached this process, or 0."""

    def __init__(self) -> None:
        self.signal = 0
        self._since: float | None = None

    @property
    def seconds(self) -> float:
        """Since the stop was asked for, here or on another rank; 0 before."""
        return 0.0 if self._since is None else time.monotonic() - self._since

    def heard(self) -> None:
        """Another rank was asked to stop."""
        self._since = self._since or time.monotonic()

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: note the first, ignore repeats (a terminal and a launcher both send SIGINT)."""
        self.signal = self.signal or number
        self.heard()


def name_of(number: int) -> str:
    """``SIGTERM`` for 15."""
    return signal.Signals(number).name


@contextmanager
def listening(
    request: StopRequest | None = None, numbers: Sequence[signal.Signals] = STOP_SIGNALS
) -> Iterator[StopRequest]:
    """Signals ``numbers`` set the ``signal`` of the yielded ``request``, a new one where there is none, until
    the block ends; the old handlers come back, unless `ignore` was called."""
    request = request or StopRequest()
    previous = {number: signal.signal(number, request.receive) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, handler)


def ignore() -> None:
    """From here on this process only leaves: torchrun sends SIGTERM to the other ranks as soon as the first
    has left, and all of them are to leave with 75."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def follow(parent: int) -> Callable[[], None]:
    """What a child of the process ``parent`` calls for a SIGTERM when that one dies; on Linux only.

    torchrun puts each worker into a session of its own, and so does a sweep its members: if the parent is
    killed, they would go on training, and hold the run folder, while the scheduler starts the job again.
    """
    if not sys.platform.startswith("linux"):
        return lambda: None
    library = ctypes.CDLL(None)  # here, since a child that was just forked should load nothing

    def ask() -> None:
        library.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)  # it died before the request

    return ask


def follow_launcher() -> None:
    """`follow` the process that has started this one."""
    follow(os.getppid())()
