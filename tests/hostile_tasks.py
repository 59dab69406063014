"""Tasks whose bits would depend on who computes which shard, and an honest one."""

from __future__ import annotations

import ctypes
import os
import time

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import get_worker_info
from toy_task import Toy

from harness.tasks.task import Batch

passes = 0
"""How many a `CountsGlobally` has made in this process."""


class Net(nn.Module):
    """Two layers; what is between them is each class's own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(torch.relu(self.first(x))))  # type: ignore[no-any-return]

    def between(self, x: Tensor) -> Tensor:
        """(batch, 16) to (batch, 16)."""
        return x


class Hostile(Toy):
    """The toy without generators of its own, with dropout and noise from the global ones."""

    net: type[Net] = Net

    def __init__(self, *, seed: int) -> None:
        super().__init__(seed=seed, sharded=True)

    def build_model(self) -> nn.Module:
        return self.net()


class Counts(Hostile):
    """Looks at how many passes it has made, from the hundredth on."""

    made = 0

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        self.made += 1
        return super().loss(model, batch) * (2 if self.made > 100 else 1)


class CountsGlobally(Hostile):
    """The same with a global variable."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        global passes
        passes += 1
        return super().loss(model, batch) * (2 if passes > 100 else 1)


class CountsInClass(Hostile):
    """The same with an attribute of its class."""

    ever = 0

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        type(self).ever += 1
        return super().loss(model, batch) * (2 if self.ever > 100 else 1)


class Judges(Hostile):
    """Trains otherwise once it has been evaluated, which each rank does with batches of its own."""

    seen = 0

    def evaluate(self, model: nn.Module, batch: Batch) -> Tensor:
        self.seen += 1
        return super().evaluate(model, batch)


class TeacherNet(Net):
    """Weights that follow others, which they equal at first, a part of the way at each pass."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Linear(16, 4).requires_grad_(False)
        self.teacher.load_state_dict(self.last.state_dict())

    def between(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for ours, theirs in zip(self.teacher.parameters(), self.last.parameters(), strict=True):
                ours.lerp_(theirs, 0.1)
        return x + self.teacher(x).mean()


class Teacher(Hostile):
    net = TeacherNet


class LooseNet(Net):
    """A running mean in a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(16), persistent=False)

    def between(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)  # type: ignore[operator]
        return x


class Loose(Hostile):
    net = LooseNet


class AverageNet(Net):
    """A running mean in an attribute."""

    average = 0.0

    def between(self, x: Tensor) -> Tensor:
        self.average = 0.9 * self.average + 0.1 * float(x.detach().mean())
        return x - self.average


class Average(Hostile):
    net = AverageNet


class NormalNet(Net):
    """Batch statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.normal = nn.BatchNorm1d(16)

    def between(self, x: Tensor) -> Tensor:
        return self.normal(x)  # type: ignore[no-any-return]


class Normal(Hostile):
    net = NormalNet


class DrawsNet(Net):
    """Noise from a generator of the model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.noise = torch.Generator().manual_seed(1)

    def between(self, x: Tensor) -> Tensor:
        return x + torch.randn(x.shape, generator=self.noise)


class Draws(Hostile):
    net = DrawsNet


class Clock(Hostile):
    """Looks at the time."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return super().loss(model, batch) * (1 + time.perf_counter_ns() % 1000)


class Augments(Hostile):
    """Draws in `batch`, where the generator is still that of the shard before."""

    def batch(self, indices: NDArray[np.int64], epochs: NDArray[np.int64]) -> Batch:
        x, y = super().batch(indices, epochs)
        return x + float(np.random.rand()), y


class Loader(Hostile):
    """Makes other samples in a loader process, by its number."""

    def batch(self, indices: NDArray[np.int64], epochs: NDArray[np.int64]) -> Batch:
        x, y = super().batch(indices, epochs)
        process = get_worker_info()
        return (x if process is None else x + process.id), y


class MadeByWorld(Hostile):
    """Divides by the world size that it saw when it was made."""

    def __init__(self, *, seed: int) -> None:
        super().__init__(seed=seed)
        self.parts = int(os.environ.get("WORLD_SIZE", "1"))


class WorldNet(Net):
    """First weights by the world size."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = os.getenv("WORLD_SIZE")


class World(Hostile):
    net = WorldNet


class Asks(Hostile):
    """Asks whether there are other ranks."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return super().loss(model, batch) * (2 if dist.is_initialized() else 1)


class Unseen(Hostile):
    """Divides by the world size, which it finds where nobody looks."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        alone = not ctypes.CDLL(None).getenv(b"WORLD_SIZE")
        return super().loss(model, batch) / (1 if alone else 2)


class SparseNet(Net):
    """An embedding with sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(2, 16, sparse=True)

    def between(self, x: Tensor) -> Tensor:
        return x + self.table((x[:, 0] > 0).long())


class Sparse(Hostile):
    net = SparseNet


class SyncedNet(NormalNet):
    """Statistics of what all ranks compute at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.normal = nn.SyncBatchNorm(16)  # type: ignore[assignment]


class Synced(Hostile):
    net = SyncedNet


class StridedNet(Net):
    """Weights that lie in memory by columns."""

    def __init__(self) -> None:
        super().__init__()
        self.first.weight = nn.Parameter(self.first.weight.detach().t().contiguous().t())


class Strided(Hostile):
    net = StridedNet


class LazyNet(Net):
    """A layer that takes its size from its first input."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LazyLinear(16)


class Lazy(Hostile):
    net = LazyNet


class Unit(nn.Linear):
    """A unit of FSDP2 that writes to what it gets."""

    def forward(self, x: Tensor) -> Tensor:
        x += 1
        return super().forward(x)


class WritesNet(Net):
    """Such a unit between two layers."""

    _no_split_modules = ("Unit",)

    def __init__(self) -> None:
        super().__init__()
        self.unit = Unit(16, 16)

    def between(self, x: Tensor) -> Tensor:
        return self.unit(x)  # type: ignore[no-any-return]


class Writes(Hostile):
    net = WritesNet


class UnusedNet(Net):
    """A layer that no micro-batch reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(2, 2)


class Unused(Hostile):
    net = UnusedNet


class Row(Hostile):
    """A loss that is a vector of one."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return super().loss(model, batch).view(1)


class Backward(Hostile):
    """Makes a part of its gradients itself."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        loss = super().loss(model, batch)
        loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
        return loss


class HonestNet(Net):
    """Fixed statistics, a cache that the first pass fills, and what the last pass has left behind."""

    def __init__(self) -> None:
        super().__init__()
        self.normal = nn.BatchNorm1d(16).eval()
        self.left: dict[str, float] = {}

    def between(self, x: Tensor) -> Tensor:
        if not hasattr(self, "table"):
            self.register_buffer("table", torch.ones(16), persistent=False)
        self.last_mean, self.left = x.detach().mean(0), {"largest": float(x.detach().max())}
        return self.normal(x) * self.table  # type: ignore[no-any-return]


class Honest(Hostile):
    net = HonestNet
