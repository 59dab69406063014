"""A checkpoint, evaluated by itself: every held-out example alone, so that each result can be kept.

The task, its data and its arithmetic are what the checkpoint's own statement says; the weights are compared
with their signed digests while they are read. One process, on the GPU where there is one.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness import config
from harness.audit.folders.opening import OpenedCheckpoint
from harness.checkpoint import candidates, state
from harness.checkpoint.state import TrainingState
from harness.errors import ConfigError, UsageError
from harness.settings import Settings
from harness.tasks import build as tasks
from harness.tasks.task import Task
from harness.terminal import progress
from harness.training import optimizer
from harness.training.evaluation.held_out import finite, on_device
from harness.training.optimizer import Precision
from harness.training.seeding import seed_rank
from harness.workers import Workers

PROCEDURE = "held-out measures"
"""Its name in statements."""


@dataclass(frozen=True)
class Suite:
    """What was asked."""

    name: str
    split: str
    sha256: str | None
    """Of the corpus, or of the files that define the tasks."""


@dataclass(frozen=True)
class Assessment:
    """What an evaluation came to."""

    metrics: Mapping[str, float]
    """Over all examples together."""
    items: tuple[Mapping[str, Any], ...]
    """What came of each example, in the order of the split."""
    settings: Mapping[str, str | int | bool | None]
    """What decides a number besides weights and data."""
    suite: Suite
    procedure: str
    """In a few words."""
    decoding: Mapping[str, str | int | bool | None] = field(default_factory=dict)
    """How text is generated; empty where none is: the measures are of given samples."""


def assess(opened: OpenedCheckpoint, base: Path, examples: int, *, quiet: bool) -> Assessment:
    """Evaluate ``opened`` on at most ``examples`` held-out samples; ``base``: folder of the run's config.

    Raises `UsageError` when data or task here are not those of the statement, `TrainingFailed` for a measure
    that is not finite, `DamagedCheckpoint` for weights other than those that were signed.
    """
    settings = config.parse(str(opened.statement.predicate["config"]["text"]), "the checkpoint's config")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seed_rank(settings.run.seed, rank=0)  # so that a task that draws gives the same after other evaluations
    task = tasks.build(settings, base)
    _require_same(task, settings, base, opened)
    precision = optimizer.precision(settings.precision, device)
    model = task.build_model().to(device)
    with_weights(model, opened, device)
    batches = task.evaluation(1, examples)
    if not batches:
        raise ConfigError("the task holds no samples out", where=settings.task.kind)
    rows = []
    facts = opened.statement.predicate["data"]
    with (
        torch.no_grad(),
        autocast_of(precision, device),
        progress(len(batches), "examples", "evaluate", quiet=quiet) as bar,
    ):
        for batch in batches:
            rows.append(task.evaluate(model, on_device(batch, device)).double().cpu())
            bar.advance(1)
    return Assessment(
        finite(task.metrics(torch.stack(rows).sum(dim=0))),
        tuple(task.metrics(row) for row in rows),
        machine(settings, device),
        Suite(str(facts["kind"]), "held-out", facts["corpus_sha256"]),
        PROCEDURE,
    )


def with_weights(model: nn.Module, opened: OpenedCheckpoint, device: torch.device) -> None:
    """Give ``model`` the weights of ``opened`` and put it in evaluation mode.

    Raises `DamagedCheckpoint` for weights other than those that were signed.
    """
    loaded, _ = candidates.open_elsewhere(Workers.alone(device), lambda: opened, lambda path: False)
    state.load_weights(TrainingState(model, torch.optim.SGD(model.parameters())), loaded)
    model.eval()


def autocast_of(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """The arithmetic of a forward pass."""
    if precision.autocast is None:
        return nullcontext()
    return torch.autocast(device.type, precision.autocast)


def machine(settings: Settings, device: torch.device) -> dict[str, str | int | bool | None]:
    """What decides a number besides weights and data."""
    return {
        "task": settings.task.kind,
        "precision": settings.precision,
        "device": device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "examples_a_pass": 1,
    }


def _require_same(task: Task, settings: Settings, base: Path, opened: OpenedCheckpoint) -> None:
    """The samples and a user's own code must be those that the statement names."""
    facts = opened.statement.predicate
    found = task.identity().digests
    for key in ("corpus", "tokenizer", "template"):
        stated = facts["data"].get(f"{key}_sha256")
        if found.get(key) != stated:
            raise UsageError(
                f"the {key} here is {_short(found.get(key))}, the checkpoint's is {_short(stated)}",
                where=str(opened.folder),
                remedy="evaluate where the run's data is; --folder names the folder of its config",
            )
    source, stated = tasks.source(settings, base), facts["code"]["task"]
    if source is not None and (stated is None or source[1] != stated["sha256"]):
        raise UsageError(
            f"the source of the task {source[0]} is not the one that the checkpoint was trained with",
            where=str(base),
            remedy="check out the code that the statement names (harness show)",
        )


def _short(digest: str | None) -> str:
    return "none" if digest is None else f"{digest[:12]}…"
