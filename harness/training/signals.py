"""SIGTERM, SIGINT and SIGUSR1 ask for a stop: at the next step boundary the loop saves and exits 75."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """The first stop signal that reached this process, or 0."""

    def __init__(self) -> None:
        self.signal = 0

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: note the first, ignore repeats (a terminal and a launcher both send SIGINT)."""
        self.signal = self.signal or number


def name_of(number: int) -> str:
    """``SIGTERM`` for 15."""
    return signal.Signals(number).name


@contextmanager
def listening() -> Iterator[StopRequest]:
    """Stop signals set the yielded request's ``signal`` until the block ends; the old handlers come back."""
    request = StopRequest()
    previous = {number: signal.signal(number, request.receive) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
