"""Start N ranks of a command on this machine, as a scheduler's launcher does: `python ranks.py N COMMAND…`

For tests whose subject is no launcher: torchrun takes three seconds of a core to begin. Ends with 1 once a
rank has failed, after the others were told to end. `fork_server` calls `main` with ranks that are forks.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fork_server import Forked

    Rank = subprocess.Popen[bytes] | Forked

_GRACE = 30
"""Seconds that the other ranks of one that failed have (torchrun's default)."""
_PORTS = range(10_000, 32_000)
"""Below those that Linux gives to connections: rank 0 binds its port seconds after it was chosen."""
_asked = itertools.count()


def fresh(command: Sequence[str], environ: Mapping[str, str]) -> Rank:
    """A new process with these variables beside our own."""
    return subprocess.Popen(command, env={**os.environ, **environ})


def started(count: int, command: Sequence[str], start: Callable[..., Rank]) -> list[Rank]:
    """``count`` processes that find each other through the variables of torch's ``env://``."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    return [start(command, {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(count)]


def free_port() -> int:
    """A free port that no other launch of this moment chooses: its own process id, and how many ports it has
    asked for, pick the first to try."""
    start = (os.getpid() + 500 * next(_asked)) % len(_PORTS)
    for port in (*_PORTS[start:], *_PORTS[:start]):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise SystemExit("ranks.py: no free port")


def failed(ranks: Sequence[Rank]) -> bool:
    """Wait until all have ended well, or one has not."""
    while True:
        codes = [rank.poll() for rank in ranks]
        if any(codes):
            return True
        if None not in codes:
            return False
        time.sleep(0.02)


def main(words: Sequence[str], start: Callable[..., Rank] = fresh) -> int:
    """The ranks from start to end; ``words`` are their number and the command."""
    ranks = started(int(words[0]), words[1:], start)
    if not failed(ranks):
        return 0
    deadline = time.monotonic() + _GRACE
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(signal.SIGTERM)
    for rank in ranks:
        try:
            rank.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.kill()
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
