"""Who is still there, and how long a stop may take: a thread beside the training thread of every rank.

**Lost ranks.** A process that is killed closes its connections, and the others fail at their next collective
without knowing why; a host that loses its power closes nothing, and the others would wait for half an hour.
So every rank leaves a sign of life in the launcher's store about once a second. Rank 0 watches all, the
others watch rank 0 and what it says. A rank without a sign of life for ``train.peer_timeout`` seconds is
lost: the others name it, and leave with 75, to be started again. A rank that fails by itself says so in the
store first, so that the others leave with its exit code and do not take it for lost.

**Deadline.** ``checkpoint.deadline`` seconds after a stop signal a checkpoint that is still being written is
given up and removed; the run then continues from the one before.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from types import TracebackType

import torch.distributed as dist

from harness.errors import HarnessError, Interrupted, PeerLost
from harness.signals import StopRequest
from harness.terminal import tell
from harness.training.ranks.distributed import attempt
from harness.training.ranks.failure import is_lost_peer
from harness.workers import ElsewhereError, Workers

_INTERVAL = 1.0
"""Seconds between two signs of life, at most."""
_GRACE = 5.0
"""Seconds that a given-up checkpoint has to be removed; then the process leaves as it is."""
_LEFT = b"left"
"""The last sign of a rank that ends in order."""


class Watchdog:
    """Watches the other ranks and the deadline while its block runs.

    The block's exception becomes `PeerLost` when a lost rank is behind it, and `ElsewhereError` when another
    rank failed first.
    """

    def __init__(
        self,
        workers: Workers,
        stop: StopRequest,
        *,
        peer_timeout: float,
        deadline: float | None,
        report: Callable[[HarnessError], None],
    ) -> None:
        """``report``: writes an error down when the training thread cannot, since it hangs."""
        self._workers = workers
        self._stop = stop
        self._timeout = peer_timeout
        self._deadline = deadline
        self._report = report
        self._interval = min(_INTERVAL, peer_timeout / 10)
        self._board = _Board(workers, peer_timeout) if workers.world_size > 1 else None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.give_up: Callable[[], None] = lambda: None
        """Called at the deadline: ends the checkpoint in flight."""

    def __enter__(self) -> Watchdog:
        if self._board is not None:
            self._board.beat()
            # Nobody looks for a rank that has not begun to beat.
            self._workers.gather_bytes(b"")
        if self._board is not None or self._deadline is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        replaced = self._verdict(error) if isinstance(error, Exception) else None
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._board is not None:
            self._board.leave()
        if replaced is not None:
            raise replaced from error

    def _verdict(self, error: Exception) -> HarnessError | None:
        """What is behind ``error``, when that is another rank."""
        if self._board is None:
            return None
        if isinstance(error, HarnessError) or not is_lost_peer(error):
            if not getattr(error, "silent", False):
                self._board.tell(error)
            return None
        told = self._board.told()
        if told is not None:
            return told
        before = self._board.signs()
        time.sleep(3 * self._interval)
        told = self._board.told()
        if told is not None:
            return told
        after = self._board.signs()
        gone = [rank for rank, (one, other) in enumerate(zip(before, after, strict=False)) if one == other]
        gone = [rank for rank in gone if after[rank] != _LEFT]
        return self._lost(gone, 3 * self._interval) if gone else None

    def _lost(self, gone: Sequence[int], seconds: float) -> PeerLost:
        names = "rank " + ", ".join(map(str, gone)) if len(gone) < 9 else f"{len(gone)} ranks"
        error = PeerLost(
            f"{names} gave no sign of life for {seconds:.0f} s: killed, or its host is lost",
            remedy="restart with the same command; the run continues from its newest checkpoint",
        )
        survivors = [rank for rank in range(self._workers.world_size) if rank not in gone]
        error.silent = bool(survivors) and survivors[0] != self._workers.rank
        return error

    def _watch(self) -> None:
        while not self._ended.wait(self._interval):
            if self._deadline is not None and self._stop.seconds > self._deadline:
                self._at_deadline(self._deadline)
                return
            if self._board is not None:
                lost = self._board.look(self._timeout)
                if lost is not None and not self._ended.is_set():
                    self._leave(self._lost([lost], self._timeout))

    def _at_deadline(self, seconds: float) -> None:
        self.give_up()
        if not self._ended.wait(_GRACE):
            self._leave(
                Interrupted(
                    f"{seconds:.0f} s after the stop signal a step or a file is still unfinished: given up",
                    where=f"rank {self._workers.rank}",
                    remedy="restart with the same command; the run continues from its newest checkpoint",
                )
            )

    def _leave(self, error: HarnessError) -> None:
        """End the process from here: the training thread waits for something that will not come."""
        self._report(error)
        if not error.silent:
            tell(f"harness: {error}", sys.stderr)
        os._exit(error.exit_code)


class _Board:
    """The launcher's store: a counter for each rank, the rank that is lost, the error of the one that failed.

    A store that does not answer brings no news, so that in the end rank 0, which is nearest to it, is lost.
    """

    def __init__(self, workers: Workers, timeout: float) -> None:
        # A connection of its own: the one of torch.distributed is busy while a group is being made.
        store = dist.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout),
        )
        self._store = dist.PrefixStore(f"watchdog/{attempt()}", store)  # type: ignore[attr-defined]
        self._rank, self._size = workers.rank, workers.world_size
        self._count = 0
        self._seen = [(b"", time.monotonic())] * self._size

    def beat(self) -> None:
        """Leave a sign of life."""
        self._count += 1
        self._store.set(f"alive/{self._rank}", str(self._count))

    def leave(self) -> None:
        """Say that this rank ends in order, so that nobody misses it."""
        with contextlib.suppress(RuntimeError):
            self._store.set(f"alive/{self._rank}", _LEFT.decode())

    def signs(self) -> list[bytes]:
        """The newest sign of every rank. An empty list when the store does not answer."""
        with contextlib.suppress(RuntimeError):
            return [bytes(each) for each in self._store.multi_get(self._keys(range(self._size)))]
        return []

    def look(self, timeout: float) -> int | None:
        """Leave a sign, read those of others; the rank that gave none for ``timeout`` seconds."""
        watched = range(self._size) if self._rank == 0 else range(1)
        now = time.monotonic()
        with contextlib.suppress(RuntimeError):
            self.beat()
            if self._rank and self._store.check(["lost"]):
                return int(self._store.get("lost"))
            for rank, sign in zip(watched, self._store.multi_get(self._keys(watched)), strict=True):
                if self._seen[rank][0] != bytes(sign):
                    self._seen[rank] = (bytes(sign), now)
        seen = ((rank, *self._seen[rank]) for rank in watched if rank != self._rank)
        lost = next((rank for rank, sign, at in seen if sign != _LEFT and now - at > timeout), None)
        if lost is not None and self._rank == 0:
            with contextlib.suppress(RuntimeError):
                self._store.set("lost", str(lost))
        return lost

    def tell(self, error: Exception) -> None:
        """Leave the reason why this rank ends."""
        code = error.exit_code if isinstance(error, HarnessError) else 1
        with contextlib.suppress(RuntimeError):
            self._store.set(
                "failed", json.dumps({"rank": self._rank, "code": code, "what": str(error)[:300]})
            )

    def told(self) -> ElsewhereError | None:
        """The error of the rank that failed, if one has said so."""
        with contextlib.suppress(RuntimeError):
            if self._store.check(["failed"]):
                note = json.loads(self._store.get("failed"))
                if note["rank"] != self._rank:
                    error = ElsewhereError(f"rank {note['rank']}: {note['what']}")
                    error.exit_code = note["code"]
                    return error
        return None

    @staticmethod
    def _keys(ranks: Sequence[int]) -> list[str]:
        return [f"alive/{rank}" for rank in ranks]
