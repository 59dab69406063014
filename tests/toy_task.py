"""A task that trains in milliseconds and draws from every kind of generator: `toy_task:Toy` in configs."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from harness.tasks.task import Batch, Generator, Identity, Task

HOLD = Path(__file__).with_name("hold")
"""Names a path; while both are there, every loss waits (`conftest.Place.hold`)."""


def held() -> bool:
    """Whether to wait."""
    try:
        return Path(HOLD.read_text()).exists()
    except FileNotFoundError:
        return False


class Noisy(nn.Module):
    """Two linear layers with dropout and batch statistics, so that buffers and RNG matter."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(8, width)
        self.normal = nn.BatchNorm1d(width)
        self.drop = nn.Dropout(0.3)
        self.last = nn.Linear(width, 4)
        self.register_buffer("calls", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1  # type: ignore[operator]
        return self.last(self.drop(torch.relu(self.normal(self.first(x)))))  # type: ignore[no-any-return]


class Skipping(nn.Sequential):
    """Linear layers, each a unit of its own under FSDP2; rank 1 leaves the last but one out."""

    _no_split_modules = ("Linear",)

    def forward(self, x: Tensor) -> Tensor:
        layers = list(self)
        for layer in layers[:-2] if os.environ.get("RANK") == "1" else layers[:-1]:
            x = layer(x)
        return layers[-1](x)  # type: ignore[no-any-return]


class Toy(Task):
    """Classify the sign pattern of noise.

    ``poison`` makes the loss of that call NaN, ``crash`` raises in that call on rank 1, ``pause`` makes every
    call last so many milliseconds longer. ``plain`` leaves out noise, dropout and batch statistics: nothing
    then depends on which rank has which sample. ``sharded`` has dropout and noise from the global generators
    only; ``own_process`` differs between processes, and ``skipping`` between ranks.
    """

    samples = 50
    unit = "sample"
    units_per_sample = 1
    headline = "accuracy"

    def __init__(
        self,
        *,
        seed: int,
        width: int = 16,
        poison: int = 0,
        crash: int = 0,
        pause: int = 0,
        plain: bool = False,
        sharded: bool = False,
        own_process: bool = False,
        skipping: bool = False,
    ) -> None:
        self._noise = torch.Generator().manual_seed(seed)
        self._numpy = np.random.default_rng(seed)
        self._python = random.Random(seed)
        self._width, self._poison, self._crash = width, poison, crash
        self._pause, self._calls = pause / 1000, 0
        self._plain, self._sharded, self._own_process = plain, sharded, own_process
        self._skipping = skipping
        self._x = torch.randn(self.samples, 8, generator=torch.Generator().manual_seed(seed))

    def identity(self) -> Identity:
        return Identity("toy", {"corpus": "0" * 64, "tokenizer": None}, {"samples": self.samples}, {})

    def build_model(self) -> nn.Module:
        if self._skipping:
            return Skipping(*(nn.Linear(8, 8) for _ in range(3)), nn.Linear(8, 4))
        if self._plain:
            return nn.Sequential(nn.Linear(8, self._width), nn.ReLU(), nn.Linear(self._width, 4))
        if self._sharded:
            drop = nn.Dropout(0.3)
            # Accelerate makes a last norm a unit that FSDP2 keeps gathered.
            norm, last = nn.LayerNorm(self._width), nn.Linear(self._width, 4)
            return nn.Sequential(nn.Linear(8, self._width), nn.ReLU(), drop, norm, last)
        return Noisy(self._width)

    def batch(self, indices: NDArray[np.int64], epochs: NDArray[np.int64]) -> Batch:
        x = self._x[torch.from_numpy(indices)]
        return x, (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        if self._poison or self._crash:
            self._calls += 1
        time.sleep(self._pause)
        while held():
            time.sleep(0.005)
        if self._crash and self._calls == self._crash and os.environ.get("RANK") == "1":
            raise ValueError("the toy breaks here")
        x, y = batch
        if not self._plain and not self._sharded:
            x = x + 0.01 * torch.randn(x.shape, generator=self._noise)
            x = x + 0.01 * float(self._numpy.normal()) + 0.01 * self._python.random()
        if self._own_process:
            x = x + 1e-6 * os.getpid()
        if not self._plain:
            x = x + 0.01 * random.random() + 0.01 * float(np.random.rand())
        loss = nn.functional.cross_entropy(model(x), y)
        return loss * float("nan") if self._poison and self._calls == self._poison else loss

    def evaluation(self, size: int, limit: int) -> Sequence[Batch]:
        return [self.batch(np.arange(size), np.zeros(size, dtype=np.int64))] * limit

    def evaluate(self, model: nn.Module, batch: Batch) -> Tensor:
        x, y = batch
        right = (model(x).argmax(-1) == y).sum()
        return torch.tensor([float(right), float(len(y))], dtype=torch.float64)

    def metrics(self, sums: Tensor) -> dict[str, float]:
        return {"accuracy": float(sums[0] / sums[1])}

    def generators(self) -> dict[str, Generator]:
        if self._plain or self._sharded:
            return {}
        return {"noise": self._noise, "numpy": self._numpy, "python": self._python}

    def files(self) -> dict[str, bytes]:
        return {"config.json": b'{"model_type": "toy"}\n'}


def config(folder: Any, **extra: str) -> str:
    """A config of this task with its run in ``folder``; ``extra`` sections replace the defaults."""
    sections = {
        "run": f"{{dir: {folder}, seed: 3}}",
        "task": '{kind: "toy_task:Toy"}',
        "train": "{steps: 24, global_batch: 12, micro_batch: 2}",
        "checkpoint": "{every: 6}",
        "evaluate": "{every: 12, batches: 2}",
        **extra,
    }
    return "".join(f"{name}: {value}\n" for name, value in sections.items())
