"""Executes a segment plainly, then again and again with one thing changed, and tells how far apart they end.

`harness replay --floor` starts this as it starts `harness.training.replay.execution`: ``python -m
harness.training.replay.perturbed ORDER``, whose ``more`` holds `Pass`es, a folder for the plain execution's
state, and the checkpoint at the end of the segment. Every pass begins with a task, a model and generators
made anew.

A perturbation computes the same mathematics in other roundings; one that needs another environment, such as
an instruction set, is a process of its own that finds the plain execution's state in the folder. A change
computes something else, to see whether it would be found.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness.checkpoint import restore, state
from harness.determinism.ledger import Ledger
from harness.tasks.task import Batch, Task
from harness.training.replay import distance, execution
from harness.training.replay.distance import Ended
from harness.training.replay.execution import Order, Place
from harness.training.step import building
from harness.training.step.position import wanted_files
from harness.training.step.session import Session

_LEAST_TO_REVERSE = 3
"""Addends from which on their order matters: two commute."""


@dataclass(frozen=True)
class Pass:
    """One execution of the segment; steps are numbers of updates. Without changes it is a plain one."""

    name: str
    threads: int | None = None
    """Perturbation: as many threads."""
    reverse: bool = False
    """Perturbation: the gradients of the micro-batches are added from the last to the first."""
    rounding: int | None = None
    """Perturbation: each element of each gradient moves to a neighbouring number, up or down by this seed."""
    rate: float = 1.0
    """Change: times the learning rate."""
    value: int | None = None
    """Change: the middle value of the first sample of this step's first tensor is another one."""
    label: int | None = None
    """Change: the last value of the first sample of its last tensor."""
    swap: int | None = None
    """Change: the batches of this step and the next one trade places."""
    skip: int | None = None
    """Change: this step updates nothing."""


def execute(order: Order, more: Mapping[str, Any]) -> None:
    """Carry ``order`` out: a plain execution first where ``more`` has an ``end``, then its passes.

    Raises `EvidenceIncomplete` when this is not what the statement says.
    """
    with execution.launched(order) as (place, task):
        workers, answer = place.workers, place.answer
        file = Path(more["folder"]) / f"plain-{workers.rank:05d}.safetensors"
        if more["end"]:
            current, before, plain = executed(place, task, order, Pass("plain"))
            save_file(dict(plain.tensors), file)
            recorded = distance.gaps(workers, _recorded(current, *more["end"]), plain)
            scales = distance.scales(workers, before, plain)
            answer.write(kind="plain", bits=plain.bits, recorded=recorded, scales=scales)
            known = plain.tensors
        else:
            known = load_file(file)
        for each in (Pass(**fields) for fields in more["passes"]):
            _, _, found = executed(place, place.task(), order, each)
            gaps = distance.gaps(workers, found, Ended(known, frozenset(), ""))
            answer.write(kind="pass", name=each.name, bits=found.bits, gaps=gaps)


def executed(place: Place, task: Task, order: Order, chosen: Pass) -> tuple[Session, Ended, Ended]:
    """The segment of ``order`` as ``chosen`` says; the session, the state before and the state after it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(chosen.threads or threads)
    try:
        current = building.build(place.settings, task, place.workers, place.prepare)
        try:
            first, stream = execution.begin(current, order)
            before = distance.ended(place.workers, current.state)
            _steps(
                current, _altered(stream, chosen, current, first), chosen, range(first + 1, order.last + 1)
            )
        finally:
            current.batches.close()
        return current, before, distance.ended(place.workers, current.state)
    finally:
        torch.set_num_threads(threads)


def _steps(current: Session, stream: Iterator[Batch], chosen: Pass, steps: Sequence[int]) -> None:
    ledger = Ledger("off", 1, current.workers.rank, current.workers.device)
    draws = torch.Generator().manual_seed(chosen.rounding or 0)
    with _added_backwards(current, chosen.reverse) as put:
        for step in steps:
            current.forward_backward(stream, ledger, [])
            put()
            if chosen.rounding is not None:
                _round(current, draws)
            current.clip_gradients()
            if step == chosen.skip:
                current.state.optimizer.zero_grad(set_to_none=True)
                current.updates += 1
            else:
                current.update(current.schedule(step) * chosen.rate)


def _recorded(current: Session, folder: str, identity: str) -> Ended:
    """What the checkpoint holds, verified while it is read, in the place of the session's state."""
    workers, wanted = current.workers, partial(wanted_files, current.workers.rank)
    loaded = workers.together(lambda: restore.load(workers, Path(folder), identity, wanted))
    state.load(current.state, loaded, loaded.trainer["aliases"])
    return distance.ended(workers, current.state)


def _altered(stream: Iterator[Batch], chosen: Pass, current: Session, after: int) -> Iterator[Batch]:
    """The micro-batches of the steps after ``after``, with the changes of ``chosen``."""
    step = after
    while True:
        step += 1
        batches = list(islice(stream, current.accumulation))
        if step == chosen.swap:
            yield from [*islice(stream, current.accumulation), *batches]
            step += 1
            continue
        if current.workers.first and step == chosen.value:
            batches[0] = (_changed(batches[0][0], 0.5), *batches[0][1:])
        if current.workers.first and step == chosen.label:
            batches[0] = (*batches[0][:-1], _changed(batches[0][-1], 1.0))
        yield from batches


def _changed(tensor: Tensor, place: float) -> Tensor:
    """``tensor`` with another value at a share ``place`` of its first sample."""
    changed = tensor.clone()
    sample = changed[0:1].view(-1)
    at = min(int(place * sample.numel()), sample.numel() - 1)
    sample[at] += -1 if sample[at] > 0 else 1
    return changed


@contextmanager
def _added_backwards(current: Session, wanted: bool) -> Iterator[Callable[[], None]]:
    """Gradients are kept apart for each micro-batch; what is yielded adds them, the last one first.

    Where ranks exchange them within a pass, or there are two, nothing is done.
    """
    parameters = list(current.model.parameters())
    if not wanted or not can_reverse(current):
        yield lambda: None
        return
    taken: dict[int, list[Tensor]] = {}

    def take(parameter: Tensor) -> None:
        if parameter.grad is not None:
            taken.setdefault(id(parameter), []).append(parameter.grad)
            parameter.grad = None

    def put() -> None:
        for parameter in parameters:
            total: Tensor | None = None
            for each in reversed(taken.pop(id(parameter), [])):
                total = each if total is None else total + each
            parameter.grad = total

    handles = [each.register_post_accumulate_grad_hook(take) for each in parameters]
    try:
        yield put
    finally:
        for each in handles:
            each.remove()


def can_reverse(current: Session) -> bool:
    """Whether an update has addends of which this process decides the order."""
    alone = current.workers.world_size == 1 and current.sums is None
    return alone and current.accumulation >= _LEAST_TO_REVERSE


def _round(current: Session, draws: torch.Generator) -> None:
    for parameter in current.model.parameters():
        if parameter.grad is None:
            continue
        local = parameter.grad.to_local() if hasattr(parameter.grad, "to_local") else parameter.grad
        up = torch.randint(2, local.shape, generator=draws, dtype=torch.bool).to(local.device)
        limit = torch.where(up, math.inf, -math.inf).to(local.dtype)
        local.copy_(torch.where(local == 0, local, torch.nextafter(local, limit)))


if __name__ == "__main__":
    sys.exit(execution.main(execute))
