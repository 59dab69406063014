"""The seam of what is learned: a task brings the samples, the model, the loss and the evaluation.

A user's own task subclasses `Task` and is named in the config by import path::

    task: {kind: "own_task:Parity", options: {width: 16}}

Rules a task keeps, on which exact resume and every world size rest:

- ``batch`` is a pure function of the seed, the epochs and the indices: no global generator, no state.
- ``evaluation`` always returns the same batches for the same arguments.
- ``identity`` changes exactly when the samples do.
- Randomness in ``loss`` comes from torch's global generator (dropout), or from a generator that
  ``generators`` returns: both are saved in every checkpoint.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Batch = tuple[Tensor, ...]
Generator = torch.Generator | np.random.Generator | random.Random


@dataclass(frozen=True)
class Identity:
    """Which samples these are. A run that finds another identity is another run."""

    kind: str
    """Kind of corpus, as the config names it."""
    digests: Mapping[str, str | None]
    """``corpus``: hex sha256; ``tokenizer``: hex sha256, or None where there is none."""
    counts: Mapping[str, int]
    """How many of what: documents, bytes, tokens, samples."""
    files: Mapping[str, str] = field(repr=False)
    """Name to hex sha256 of every file the samples came from, to name what changed."""


class Task(ABC):
    """What is learned. Constructed as ``cls(seed=run.seed, **task.options)``."""

    samples: int
    """Number of training samples: one epoch."""
    unit: str
    """What throughput counts: ``token``, ``image``…"""
    units_per_sample: int
    """Units of one sample."""
    headline: str
    """Name of the metric of `metrics` that is shown first."""

    @abstractmethod
    def __init__(self, *, seed: int, **options: Any) -> None:
        """Prepare the samples. The same ``seed`` and ``options`` give the same task in every process."""

    @abstractmethod
    def identity(self) -> Identity:
        """Which samples these are."""

    @abstractmethod
    def build_model(self) -> nn.Module:
        """A new fp32 model on the CPU, initialised from torch's global generator, which the caller seeded."""

    @abstractmethod
    def batch(self, indices: NDArray[np.int64], epochs: NDArray[np.int64]) -> Batch:
        """The samples ``indices``, each as seen in its epoch: CPU tensors of leading size len(indices)."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The scalar loss, a mean over the micro-batch; ``batch`` is on the model's device."""

    @abstractmethod
    def evaluation(self, size: int, limit: int) -> Sequence[Batch]:
        """At most ``limit`` batches of at most ``size`` held-out samples; empty when nothing is held out."""

    @abstractmethod
    def evaluate(self, model: nn.Module, batch: Batch) -> Tensor:
        """A float64 vector of sums over ``batch``; the caller adds them over batches and ranks."""

    @abstractmethod
    def metrics(self, sums: Tensor) -> dict[str, float]:
        """What the added sums mean, by name; contains `headline`."""

    def flops_per_sample(self) -> int | None:
        """Floating point operations of forward and backward for one sample, for MFU; None when unknown."""
        return None

    def files(self) -> dict[str, bytes]:
        """Further files of a checkpoint by name, such as config.json; the same at every step."""
        return {}

    def require_unchanged(self) -> None:
        """Raise `VerificationFailed` when samples are read from files that do not hold any more what
        `identity` names; called before each checkpoint, on every rank."""
        return

    def generators(self) -> dict[str, Generator]:
        """Generators the task draws from while training; saved and restored on every rank."""
        return {}


class Batches(Sequence[Batch]):
    """A sequence of ``count`` batches that ``make(number)`` makes when asked for, so none is held."""

    def __init__(self, count: int, make: Callable[[int], Batch]) -> None:
        self._count = count
        self._make = make

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, number: int) -> Batch: ...
    @overload
    def __getitem__(self, number: slice) -> list[Batch]: ...
    def __getitem__(self, number: int | slice) -> Batch | list[Batch]:
        if isinstance(number, slice):
            return [self._make(each) for each in range(self._count)[number]]
        return self._make(range(self._count)[number])


def spread(available: int, size: int, limit: int) -> list[NDArray[np.int64]]:
    """Indices of held-out samples: at most ``limit`` groups of ``size``, evenly spread over ``available``."""
    total = min(available, size * limit)
    chosen = np.arange(total, dtype=np.int64) * available // max(total, 1)
    return [chosen[start : start + size] for start in range(0, total, size)]
