"""Micro-batches of a rank in order, from any step, the same at every number of loader processes.

An update takes ``global_batch`` consecutive positions of the `Order`. Logical shard k of it is the positions
[k x micro_batch, (k + 1) x micro_batch); a rank of ``world_size`` owns ``accumulation`` neighbouring shards.
So the shards of an update are the same at every world size; only who computes them differs.
``interleaved`` ranks own every ``world_size``-th shard instead.

The global generators of python, numpy and torch are never touched, neither by seeking nor by iterating.
"""

from __future__ import annotations

import atexit
import multiprocessing
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from harness import signals
from harness.data.order import Order
from harness.errors import ConfigError, EnvironmentFault

Batch = tuple[Tensor, ...]

# Positions computed at once when loading in the training process: permuting one costs 100 us, a thousand
# not twice that.
_BLOCK = 1024


class Source(Protocol):
    """What samples come from: a task, or anything with its ``batch``."""

    def batch(self, indices: NDArray[np.int64], epochs: NDArray[np.int64]) -> Batch:
        """The samples ``indices`` as seen in ``epochs``: a pure function."""
        ...


class MicroBatches:
    """The micro-batches of one rank.

    ``workers`` processes prepare them ahead of time; with 0 they are made when asked for. Raises
    `ConfigError` when the global batch is not a multiple of ``micro_batch`` x ``world_size``.
    """

    def __init__(
        self,
        task: Source,
        order: Order,
        *,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        workers: int = 0,
        interleaved: bool = False,
    ) -> None:
        if global_batch % (micro_batch * world_size):
            raise ConfigError(
                f"train.global_batch {global_batch} is not a multiple of train.micro_batch {micro_batch} "
                f"x {world_size} processes",
                remedy="change one of the three",
            )
        if workers and "fork" not in multiprocessing.get_all_start_methods():
            raise EnvironmentFault("loader processes need fork", remedy="set train.data_workers=0")
        self.accumulation = global_batch // (micro_batch * world_size)
        self._task = task
        self._order = order
        self._global_batch = global_batch
        self._micro_batch = micro_batch
        self.interleaved = interleaved
        self._first, self._stride = (rank, world_size) if interleaved else (rank * self.accumulation, 1)
        self.workers = workers
        self._stream: _WorkerStream | None = None

    def iterate(self, from_step: int) -> Iterator[Batch]:
        """Endless micro-batches of this rank: ``accumulation`` for update ``from_step``, then the next's.

        Updates count from 0. A second call ends the loader processes of the first.
        """
        self.close()
        if not self.workers:
            return self._direct(from_step)
        self._stream = _WorkerStream(
            _Numbered(self), from_step * self.accumulation, self.workers, self._order.seed
        )
        return self._stream

    def close(self) -> None:
        """End the loader processes, if any."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def numbered(self, number: int) -> Batch:
        """Micro-batch ``number`` of this rank, counted from update 0."""
        epochs, indices = self._order.at(self._positions(number, 1))
        return self._task.batch(indices, epochs)

    def shard(self, number: int) -> int:
        """Which logical shard of an update this rank's micro-batch ``number`` of it is."""
        return self._first + number * self._stride

    def _positions(self, number: int, count: int) -> NDArray[np.int64]:
        """Positions in the order of ``count`` micro-batches from ``number`` on."""
        updates, pieces = np.divmod(np.arange(number, number + count, dtype=np.int64), self.accumulation)
        starts = updates * self._global_batch + (self._first + pieces * self._stride) * self._micro_batch
        positions: NDArray[np.int64] = starts[:, None] + np.arange(self._micro_batch, dtype=np.int64)
        return positions.reshape(-1)

    def _direct(self, from_step: int) -> Iterator[Batch]:
        size = self._micro_batch
        block = -(-_BLOCK // size)
        number = from_step * self.accumulation
        while True:
            epochs, indices = self._order.at(self._positions(number, block))
            for start in range(0, block * size, size):
                yield self._task.batch(indices[start : start + size], epochs[start : start + size])
            number += block


class _Numbered(Dataset[Batch]):
    """The micro-batches by number, as torch's loader wants them."""

    def __init__(self, batches: MicroBatches) -> None:
        self._batches = batches

    def __getitem__(self, number: int) -> Batch:
        return self._batches.numbered(number)


class _From(Sampler[int]):
    """The numbers from ``first`` on, without end."""

    def __init__(self, first: int) -> None:
        self._first = first

    def __iter__(self) -> Iterator[int]:
        number = self._first
        while True:
            yield number
            number += 1


class _WorkerStream(Iterator[Batch]):
    """Micro-batches from loader processes.

    They are forked: a task need not be picklable and its mapped data is shared, and a loader process runs
    nothing but numpy and CPU tensors. The private generator keeps torch from drawing a base seed from the
    global one.
    """

    def __init__(self, dataset: _Numbered, first: int, workers: int, seed: int) -> None:
        loader: DataLoader[Batch] = DataLoader(
            dataset,
            batch_size=None,
            sampler=_From(first),
            num_workers=workers,
            collate_fn=_unchanged,
            worker_init_fn=_ignore_signals,
            multiprocessing_context="fork",
            generator=torch.Generator().manual_seed(seed % 2**63),
        )
        before = set(multiprocessing.active_children())
        with _child_signal_handler_kept():
            self._batches: Any = iter(loader)
        self._processes = set(multiprocessing.active_children()) - before
        # Runs before multiprocessing's exit handler, which would wait for processes that ignore SIGTERM.
        atexit.register(self.close)

    def __next__(self) -> Batch:
        if self._batches is None:
            raise StopIteration
        try:
            batch: Batch = next(self._batches)
            return batch
        except (RuntimeError, EOFError, ConnectionError) as error:
            # A process may die while it hands over a batch; torch notices only deaths before and after that.
            if str(error).startswith("Caught ") or _of_this_process(error):
                raise
            raise EnvironmentFault(
                f"a loader process died: {str(error) or type(error).__name__}",
                remedy="look for the out-of-memory killer, or lower train.data_workers",
            ) from error

    def close(self) -> None:
        """End the processes."""
        if self._batches is None:
            return
        # Not left to the iterator's __del__: the traceback of an error that was caught may hold it.
        self._batches._shutdown_workers()
        self._batches = None
        for process in self._processes:
            if process.is_alive():
                process.kill()
        atexit.unregister(self.close)


@contextmanager
def _child_signal_handler_kept() -> Iterator[None]:
    """Undo torch's handler of SIGCHLD: it raises wherever the training process happens to be, in the middle
    of an update or of a checkpoint. Without it the death is noticed, within 5 s, when a batch is missing."""
    handler = signal.getsignal(signal.SIGCHLD)
    yield
    if threading.current_thread() is threading.main_thread() and handler is not None:
        signal.signal(signal.SIGCHLD, handler)


def _of_this_process(error: Exception) -> bool:
    """Whether ``error`` is one that torch raised here for another reason than a process that died."""
    return isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker")


def _unchanged(batch: Any) -> Any:
    """Instead of torch's own collation, which makes a list of a tuple."""
    return batch


def _ignore_signals(_worker: int) -> None:
    """The training process decides when loading ends; a signal to the whole group must not."""
    signals.ignore()
