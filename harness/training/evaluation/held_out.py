"""Evaluation on the held-out split: the same batches each time, and no trace left in the run.

Each batch has generators of its own, so what a task draws in ``evaluate`` depends neither on the step nor on
the rank that has the batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from harness.checkpoint import rng
from harness.checkpoint.cut import is_sharded
from harness.errors import TrainingFailed
from harness.tasks.task import Batch, Task
from harness.training.seeding import seed_evaluation
from harness.workers import Workers


def evaluate(
    task: Task,
    model: nn.Module,
    batches: Sequence[Batch],
    workers: Workers,
    autocast: AbstractContextManager[Any],
) -> dict[str, float]:
    """The task's metrics over ``batches``, divided among the ranks.

    Sums are added in the order of the batches whatever the world size, in float64. The generators and the
    mode of every module are afterwards as they were before. Raises `TrainingFailed` for a non-finite metric.
    """
    rows: dict[int, Tensor] = {}
    with evaluating(task, model), autocast:
        for position in range(workers.rank, len(batches), workers.world_size):
            seed_evaluation(position)
            batch = on_device(batches[position], workers.device)
            rows[position] = task.evaluate(model, batch).double().cpu()
        if is_sharded(model) and len(rows) < -(-len(batches) // workers.world_size):
            # The shards are gathered in every pass, so each rank must make as many as the others.
            task.evaluate(model, on_device(batches[0], workers.device))
    width = next(iter(rows.values())).numel() if rows else 0
    width = max(int.from_bytes(data, "little") for data in workers.gather_bytes(width.to_bytes(4, "little")))
    table = torch.zeros(len(batches), width, dtype=torch.float64)
    for position, row in rows.items():
        table[position] = row
    metrics = task.metrics(workers.sum_float64(table).sum(dim=0))
    return finite(metrics, "look at the last checkpoint's loss; lower the learning rate")


@contextmanager
def evaluating(task: Task, model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; generators and the mode of every module are afterwards as before."""
    generators = task.generators()
    state = rng.capture(generators)
    was_training, modes = model.training, [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
        # Layers that the task keeps in evaluation mode, as those with fixed statistics, stay in it.
        for module, mode in modes:
            module.training = mode
        rng.restore(state, generators)


def finite(metrics: dict[str, float], remedy: str = "") -> dict[str, float]:
    """``metrics``. Raises `TrainingFailed` with the ``remedy`` when one is not finite."""
    broken = [name for name, value in metrics.items() if not math.isfinite(value)]
    if broken:
        raise TrainingFailed(f"the evaluation gave a non-finite {', '.join(broken)}", remedy=remedy)
    return metrics


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The tensors of ``batch`` on ``device``; a copy from pinned memory to a GPU waits for nothing."""
    return tuple(tensor.to(device, non_blocking=True) for tensor in batch)
