"""What surrounds the steps of a launch, each made once on every rank: task, watchdog, writer, double runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from harness.checkpoint.writer import CheckpointWriter
from harness.determinism.ledger import Ledger
from harness.errors import TrainingFailed
from harness.format import strict_json
from harness.format.budget import percent, remedy
from harness.format.layout import RunFolder
from harness.settings import Settings
from harness.signals import StopRequest
from harness.stores.client import ObjectStore
from harness.tasks import build as tasks
from harness.tasks.task import Batch, Task
from harness.training.desk import Desk
from harness.training.ranks import distributed, failure
from harness.training.ranks.watchdog import Watchdog
from harness.training.step.doubling import Doubling
from harness.training.step.session import Session
from harness.training.telemetry.metrics import Events
from harness.training.telemetry.screen import Screen
from harness.workers import Workers


def events_path(settings: Settings, rank: int) -> Path:
    """The events file of ``rank``."""
    return RunFolder(settings.run.dir).events(rank)


def build_task(workers: Workers, settings: Settings, base: Path) -> Task:
    """The task on every rank; rank 0 first, since it may fill a cache that the others then read.

    Raises `TrainingFailed` when two ranks find different samples.
    """
    make: Callable[[], Task] = partial(tasks.build, settings, base)
    if settings.determinism.elastic:
        from harness.training.elastic import rehearsal

        make = partial(rehearsal.make_task, make)
    task = workers.first_only(make)
    task = workers.together(lambda: task or make())
    digest = strict_json.dumps({**task.identity().digests, "samples": task.samples})
    for rank, other in enumerate(workers.gather_bytes(digest)):
        if other != digest:
            raise TrainingFailed(
                f"rank {rank} finds other samples than rank {workers.rank}",
                where="data",
                remedy="give every host the same files and package versions",
            )
    return task


def watchdog(workers: Workers, settings: Settings, stop: StopRequest) -> Watchdog:
    """What watches the other ranks and the deadline of this one."""
    return Watchdog(
        workers,
        stop,
        peer_timeout=settings.train.peer_timeout,
        deadline=settings.checkpoint.deadline,
        report=lambda error: failure.report(error, settings.run.dir),
    )


def writer(
    workers: Workers, settings: Settings, desk: Desk | None, store: ObjectStore | None
) -> CheckpointWriter:
    """This rank's writer of checkpoints; collective, since its threads get a control group of their own."""
    return CheckpointWriter(
        RunFolder(settings.run.dir),
        distributed.beside(workers),
        None if desk is None else desk.publisher,
        store=store,
        step_back=workers.device.type == "cpu",
    )


def doubling(
    settings: Settings, workers: Workers, current: Session, ledger: Ledger, start: int
) -> Doubling | None:
    """What executes micro-steps twice; None when the config lets nothing be looked at."""
    if not ledger.looks or settings.determinism.budget == 0:
        return None
    return Doubling(
        ledger,
        workers,
        current.model,
        current.wrapped,
        current.task.generators(),
        (current.task,),
        start=start,
        steps=settings.train.steps - start,
        budget=settings.determinism.budget,
        digest_ns=lambda: current.digest_ns,
    )


SETTLED = 21
"""Steps of a launch after which its step digests have a cost: of gradients, and by default of one state."""


def tell_digests(current: Session, step: int, screen: Screen, events: Events) -> None:
    """Say that step digests alone take more than ``determinism.budget``, if so, and what to do."""
    if current.doubling is None:
        return
    budget = current.doubling.spent(step)
    if budget.digests is None or budget.digests <= budget.limit:
        return
    took = f"step digests take {percent(budget.digests)} of the time of a step"
    allowed = f"determinism.budget is {percent(budget.limit)}"
    text = f"{took}, and {allowed}: {remedy(budget.digests, budget.limit)}"
    screen.say(f"step {step}: {text}")
    events.write("over budget", "warning", step=step, reason=text)


def evaluation_batches(task: Task, settings: Settings) -> Sequence[Batch]:
    """The held-out batches, the same at every evaluation and world size."""
    return task.evaluation(settings.train.micro_batch, settings.evaluate.batches)
