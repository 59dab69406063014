"""Processes that each do a part of a preparation; they end with this one, and when it is interrupted."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from harness.cores import process_cpu_count
from harness.data import parts
from harness.data.parts import Workplace
from harness.errors import EnvironmentFault
from harness.terminal import progress


class Processes:
    """Processes that end with this one, and when it is interrupted."""

    def __init__(self, place: Workplace, quiet: bool) -> None:
        self._quiet = quiet
        spawn = multiprocessing.get_context("spawn")
        self._stopped, self._stop = spawn.Pipe(duplex=False)
        self._pool = ProcessPoolExecutor(
            place.recipe.workers or process_cpu_count(),
            mp_context=spawn,
            initializer=parts.leave_with_parent,
            initargs=(self._stopped,),
        )

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and not issubclass(kind, Exception):
            self._stop.close()
        self._pool.shutdown(cancel_futures=True)
        self._stop.close()
        self._stopped.close()

    def run(self, label: str, jobs: Sequence[tuple[Callable[..., None], tuple[Any, ...]]]) -> None:
        """Do ``jobs`` in any order. Raises the first failure."""
        with progress(len(jobs), "parts", label, quiet=self._quiet) as bar:
            try:
                with _ctrl_c_held_back():
                    futures = [self._pool.submit(work, *words) for work, words in jobs]
                for future in as_completed(futures):
                    future.result()
                    bar.advance(1)
            except BrokenProcessPool as error:
                raise EnvironmentFault(
                    "a process that prepares data died",
                    remedy="look for the out-of-memory killer, or lower workers; the same command goes on",
                ) from error


@contextlib.contextmanager
def _ctrl_c_held_back() -> Iterator[None]:
    """Processes that are started in the block never get one; it reaches this process after the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
