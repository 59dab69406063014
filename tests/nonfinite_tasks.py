"""A task that ends at a NaN or an infinity when one known sample comes: `nonfinite_tasks:Ends` in configs."""

from __future__ import annotations

import os

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from toy_task import Toy

from harness.data.order import Order
from harness.tasks.task import Batch

BAD = 40
"""The sample that brings the fault out."""
MICRO_BATCH, ACCUMULATION = 2, 6


class Fault(nn.Module):
    """Passes on what it gets, (batch, width), and does something to rows where ``bad``, (batch, 1), is 1."""

    times = 0
    """How often the bad sample has come in this process: what no sandbox can see or put back."""

    def forward(self, x: Tensor, bad: Tensor) -> Tensor:
        """Both, of the same batch."""
        return self.changed(x, bad)

    def changed(self, x: Tensor, bad: Tensor) -> Tensor:
        """What the faults change."""
        return x

    def at_first(self, bad: Tensor) -> float:
        """A NaN the first time that the bad sample comes."""
        type(self).times += bool(bad.any())
        return float("nan") if bad.any() and self.times == 1 else 0.0


class Logarithm(Fault):
    """The logarithm of zero, forwards."""

    def changed(self, x: Tensor, bad: Tensor) -> Tensor:
        return x + torch.log(1 - bad)


class Talking(Logarithm):
    """The same, and a collective in each forward pass, as batch statistics of all ranks have it."""

    def changed(self, x: Tensor, bad: Tensor) -> Tensor:
        if dist.is_initialized():
            dist.all_reduce(x.detach().mean())
        return super().changed(x, bad)


class Root(Fault):
    """Finite forwards; the gradient of a root at zero."""

    def changed(self, x: Tensor, bad: Tensor) -> Tensor:
        return torch.sqrt(x.abs() * (1 - bad))


class Steep(Fault):
    """Finite gradients whose squares add up to infinity."""

    def changed(self, x: Tensor, bad: Tensor) -> Tensor:
        steep = x * 1e25 * bad
        return x + (steep - steep.detach())


class Memory(Fault):
    """Reads memory that nobody has written; it held a NaN the first time."""

    def changed(self, x: Tensor, bad: Tensor) -> Tensor:
        return x + 1e-3 * torch.empty_like(x) + self.at_first(bad)


class Noise(Fault):
    """What it adds comes from the operating system; it was a NaN the first time."""

    def changed(self, x: Tensor, bad: Tensor) -> Tensor:
        return x + (int.from_bytes(os.urandom(2), "little") / 2**16 + self.at_first(bad))


class Once(Fault):
    """A NaN the first time, and nothing that differs after it."""

    def changed(self, x: Tensor, bad: Tensor) -> Tensor:
        return x + self.at_first(bad)


class Counting(Once):
    """The same, and a counter that each pass moves on."""

    calls = 0

    def changed(self, x: Tensor, bad: Tensor) -> Tensor:
        self.calls += 1
        return super().changed(x, bad)


class Raising(Once):
    """The same, and an error the second time."""

    def changed(self, x: Tensor, bad: Tensor) -> Tensor:
        made = super().changed(x, bad)
        if bad.any() and self.times > 1:
            raise ValueError("the fault does not like to be looked at")
        return made


class Parting(Raising):
    """The same between two collectives."""

    def changed(self, x: Tensor, bad: Tensor) -> Tensor:
        dist.all_reduce(x.detach().mean())
        made = super().changed(x, bad)
        dist.all_reduce(x.detach().mean())
        return made


class Faulty(nn.Module):
    """Two layers and dropout with a `Fault` between them."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        kind: type[Fault] = globals()[fault]
        kind.times = 0
        self.first, self.drop, self.last = nn.Linear(8, 16), nn.Dropout(0.3), nn.Linear(16, 4)
        self.fault = kind()

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 8) to (batch, 4)."""
        bad = (x[:, :1] > 50).float()
        return self.last(self.drop(self.fault(self.first(x.clamp(-3, 3)), bad)))  # type: ignore[no-any-return]


class Ends(Toy):
    """The toy without generators of its own, whose sample `BAD` is marked for a `Fault`."""

    def __init__(self, *, seed: int, fault: str) -> None:
        super().__init__(seed=seed, plain=True)
        self._fault = fault
        self._x[BAD, 0] = 100.0

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(model(x), y)

    def build_model(self) -> nn.Module:
        return Faulty(self._fault)


def first_seen(seed: int, samples: int = Toy.samples) -> tuple[int, int]:
    """The step, from 1, in which `BAD` first comes, and its micro-batch of that update of one rank."""
    _, indices = Order(samples, seed).at(np.arange(samples, dtype=np.int64))
    position = int(np.flatnonzero(indices == BAD)[0])
    update, rest = divmod(position, MICRO_BATCH * ACCUMULATION)
    return update + 1, rest // MICRO_BATCH
