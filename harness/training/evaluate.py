"""Evaluation on the held-out split: the same batches each time, and no trace left in the run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from harness.checkpoint import rng
from harness.checkpoint.cut import is_sharded
from harness.errors import TrainingFailed
from harness.tasks.task import Batch, Task
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
    model's mode are afterwards as they were before. Raises `TrainingFailed` for a non-finite metric.
    """
    state = rng.capture({})
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), autocast:
            rows = {
                position: task.evaluate(model, on_device(batches[position], workers.device)).double().cpu()
                for position in range(workers.rank, len(batches), workers.world_size)
            }
            if is_sharded(model) and len(rows) < -(-len(batches) // workers.world_size):
                # The shards are gathered in every pass, so each rank must make as many as the others.
                task.evaluate(model, on_device(batches[0], workers.device))
    finally:
        model.train(was_training)
        rng.restore(state, {})
    width = next(iter(rows.values())).numel() if rows else 0
    width = max(int.from_bytes(data, "little") for data in workers.gather_bytes(width.to_bytes(4, "little")))
    table = torch.zeros(len(batches), width, dtype=torch.float64)
    for position, row in rows.items():
        table[position] = row
    metrics = task.metrics(workers.sum_float64(table).sum(dim=0))
    return finite(metrics, "look at the last checkpoint's loss; lower the learning rate")


def finite(metrics: dict[str, float], remedy: str = "") -> dict[str, float]:
    """``metrics``. Raises `TrainingFailed` with the ``remedy`` when one is not finite."""
    broken = [name for name, value in metrics.items() if not math.isfinite(value)]
    if broken:
        raise TrainingFailed(f"the evaluation gave a non-finite {', '.join(broken)}", remedy=remedy)
    return metrics


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The tensors of ``batch`` on ``device``; a copy from pinned memory to a GPU waits for nothing."""
    return tuple(tensor.to(device, non_blocking=True) for tensor in batch)
