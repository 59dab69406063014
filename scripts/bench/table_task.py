"""The task of these benchmarks: a decoder of any size on a table of random bytes, so that data is free."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from harness.model.gpt import GPT, Shape
from harness.tasks.task import Batch, Identity, Task

VOCABULARY = 256
SAMPLES = 4096
on_batch: Callable[[], None] | None = None
"""Called whenever a training batch is made."""


class Table(Task):
    """Next-byte prediction on ``SAMPLES`` rows of random bytes; named ``table_task:Table`` in configs."""

    samples = SAMPLES
    unit = "token"
    headline = "loss"

    def __init__(self, *, seed: int, layers: int, width: int, heads: int, length: int) -> None:
        self._shape = Shape(VOCABULARY, length, layers, width, heads, heads)
        generator = torch.Generator().manual_seed(0)
        self.rows = torch.randint(VOCABULARY, (SAMPLES, length + 1), generator=generator)
        self.units_per_sample = length

    def identity(self) -> Identity:
        return Identity("table", {"corpus": "0" * 64, "tokenizer": None}, {"samples": SAMPLES}, {})

    def build_model(self) -> nn.Module:
        return GPT(self._shape)

    def batch(self, indices: NDArray[np.int64], epochs: NDArray[np.int64]) -> Batch:
        if on_batch is not None:
            on_batch()
        return self.gather(indices, epochs)

    def gather(self, indices: NDArray[np.int64], epochs: NDArray[np.int64]) -> Batch:
        """`batch` without `on_batch`."""
        return (self.rows[torch.from_numpy(indices)],)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = model(batch[0][:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch[0][:, 1:].reshape(-1))

    def evaluation(self, size: int, limit: int) -> Sequence[Batch]:
        return [(self.rows[:size],)]

    def evaluate(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.loss(model, batch).reshape(1)

    def metrics(self, sums: Tensor) -> dict[str, float]:
        return {"loss": float(sums[0])}
