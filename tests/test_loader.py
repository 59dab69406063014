"""Micro-batches: the same at any number of loader processes and ranks; global generators stay untouched."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from harness.data.loader import MicroBatches
from harness.data.order import Order
from harness.errors import ConfigError, EnvironmentFault

SAMPLES = 37


TIMEOUT = 240
"""Seconds, as in conftest, which the processes that import this file cannot."""


class Numbers:
    """Samples that say which they are: index, epoch, and the process that made them."""

    def batch(self, indices: NDArray[np.int64], epochs: NDArray[np.int64]) -> tuple[Tensor, ...]:
        return torch.from_numpy(indices), torch.from_numpy(epochs)


class Faulty(Numbers):
    """Kills its process, or raises, at the first batch of epoch 1."""

    def __init__(self, how: str) -> None:
        self.how = how

    def batch(self, indices: NDArray[np.int64], epochs: NDArray[np.int64]) -> tuple[Tensor, ...]:
        if epochs.max() > 0:
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyError("sample is broken")
        return super().batch(indices, epochs)


def loader(
    task: Numbers, workers: int = 0, rank: int = 0, world_size: int = 1, micro: int = 2
) -> MicroBatches:
    return MicroBatches(
        task,
        Order(SAMPLES, seed=4),
        global_batch=12,
        micro_batch=micro,
        rank=rank,
        world_size=world_size,
        workers=workers,
    )


def taken(batches: MicroBatches, from_step: int, count: int) -> list[list[tuple[int, int]]]:
    """The (index, epoch) pairs of ``count`` micro-batches from ``from_step`` on."""
    stream = batches.iterate(from_step)
    pairs = [list(zip(*(part.tolist() for part in batch), strict=True)) for batch in islice(stream, count)]
    batches.close()
    return pairs


def test_batches_are_the_orders_places_in_turn() -> None:
    """Oracle: the order itself, sample j of update s at position s * global_batch + j."""
    epochs, indices = Order(SAMPLES, seed=4).places(3 * 12, 120)
    expected = list(zip(indices.tolist(), epochs.tolist(), strict=True))
    found = [pair for batch in taken(loader(Numbers()), 3, 60) for pair in batch]
    assert found == expected


@pytest.mark.parametrize("workers", [1, 2])
def test_loader_processes_change_nothing(workers: int) -> None:
    """Oracle: loading in the training process, over epoch boundaries and from several steps."""
    for step in (0, 7, 10**9):
        assert taken(loader(Numbers(), workers), step, 30) == taken(loader(Numbers()), step, 30)


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_an_update_has_the_same_shards_at_every_world_size(world_size: int) -> None:
    """Oracle: one process's shards of each update; ranks own neighbouring shards, in order."""
    alone = taken(loader(Numbers()), 5, 6 * 4)
    accumulation = 6 // world_size
    ranks = [
        taken(loader(Numbers(), rank=rank, world_size=world_size), 5, accumulation * 4)
        for rank in range(world_size)
    ]
    for update in range(4):
        pieces = slice(update * accumulation, (update + 1) * accumulation)
        together = [shard for rank in ranks for shard in rank[pieces]]
        assert together == alone[update * 6 : (update + 1) * 6]


@pytest.mark.parametrize("micro", [1, 3, 6, 12])
def test_the_micro_batch_size_changes_no_order(micro: int) -> None:
    """Oracle: the samples of micro-batches of two, one after the other."""
    expected = [pair for batch in taken(loader(Numbers()), 2, 60) for pair in batch]
    found = [pair for batch in taken(loader(Numbers(), micro=micro), 2, 120 // micro) for pair in batch]
    assert found == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_global_generators_are_never_touched(workers: int) -> None:
    """Oracle: the states of python, numpy and torch before and after making, iterating and seeking."""
    before = random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()
    batches = loader(Numbers(), workers)
    for step in (0, 100):
        list(islice(batches.iterate(step), 40))
    batches.close()
    assert random.getstate() == before[0]
    state = np.random.get_state(legacy=False)
    assert str(state) == str(before[1])
    assert (state["state"]["key"] == before[1]["state"]["key"]).all()
    assert torch.equal(torch.get_rng_state(), before[2])


def test_a_tuple_stays_a_tuple_of_tensors_in_shared_memory_or_not() -> None:
    """Oracle: the type that loading in the process gives."""
    for workers in (0, 1):
        batches = loader(Numbers(), workers)
        batch = next(batches.iterate(0))
        batches.close()
        assert type(batch) is tuple
        assert [part.dtype for part in batch] == [torch.int64, torch.int64]


def test_a_global_batch_that_does_not_divide_is_an_error() -> None:
    """Oracle: the documented error, naming the three numbers."""
    with pytest.raises(ConfigError, match=r"12 is not a multiple of train.micro_batch 2 x 5"):
        loader(Numbers(), world_size=5)


def test_a_loader_process_that_dies_is_an_error() -> None:
    """Oracle: the documented error, within seconds and not a hang."""
    batches = loader(Faulty("kill"), workers=1)
    with pytest.raises(EnvironmentFault, match="loader process died"):
        list(islice(batches.iterate(0), 60))
    batches.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_the_task_stays_what_it_is(workers: int) -> None:
    """Oracle: the exception type that the task raised."""
    batches = loader(Faulty("raise"), workers)
    with pytest.raises(KeyError, match="sample is broken"):
        list(islice(batches.iterate(0), 60))
    batches.close()


def test_loading_survives_signals_and_ends_when_closed() -> None:
    """Oracle: batches still come after each signal; no child process is left after close."""
    before = _children()
    batches = loader(Numbers(), workers=2)
    stream = batches.iterate(0)
    found = [next(stream), next(stream)]
    children = _children() - before
    assert len(children) == 2
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        for child in children:
            os.kill(child, number)
        found += islice(stream, 12)
    batches.close()
    assert [len(batch[0]) for batch in found] == [2] * 38
    deadline = time.monotonic() + TIMEOUT
    while children & _children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not children & _children()


EXITS = """
import sys
from itertools import islice
from test_loader import Faulty, Numbers, loader
batches = loader({task}, workers=2)
try:
    print(len(list(islice(batches.iterate(0), 30))))
except KeyError as error:
    kept = error
    {then}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "then"),
    [("Numbers()", ""), ("Faulty('raise')", "batches.close()"), ("Faulty('raise')", "raise")],
)
def test_a_process_that_forgets_to_close_ends_at_once(task: str, then: str) -> None:
    """Oracle: the clock: loader processes that ignore SIGTERM keep no trainer from ending, even when the
    traceback of an error is kept."""
    script = EXITS.format(task=task, then=then or "pass")
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parent.parent}"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, env=environment, timeout=TIMEOUT, check=False, stderr=subprocess.PIPE, text=True
    )
    assert done.returncode == (1 if then == "raise" else 0), done.stderr
    assert ("sample is broken" in done.stderr) == (then == "raise")


def test_a_closed_stream_ends() -> None:
    """Oracle: StopIteration, as of any finished iterator."""
    batches = loader(Numbers(), workers=1)
    stream = batches.iterate(0)
    next(stream)
    batches.close()
    assert list(stream) == []


def _children() -> set[int]:
    """Ids of the children of this process."""
    text = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    return {int(word) for word in text.split()}
