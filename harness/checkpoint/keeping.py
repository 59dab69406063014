"""Which checkpoints stay: the newest, every k-th step, the best by a metric, and pinned ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Best:
    """The checkpoints with the best values of an evaluation metric."""

    metric: str
    """Name in the evaluation's scores, or ``train_loss`` for the loss of the step itself."""
    mode: Literal["min", "max"]
    count: int


@dataclass(frozen=True)
class Keep:
    """A checkpoint stays when any of these wants it."""

    newest: int | None = None
    """Number of newest ones, at least 1; None keeps all."""
    every: int = 0
    """Those whose step is a multiple of this; 0 for none."""
    best: Best | None = None
    pinned: frozenset[int] = frozenset()
    """Steps."""

    def dropped(self, scores: Mapping[int, Mapping[str, float]]) -> list[int]:
        """The steps whose tensors may go, of the checkpoints with these ``scores`` by step; never the newest.

        A checkpoint without a value of the metric is not among the best. Of equal ones the later is better.
        """
        if self.newest is None:
            return []
        steps = sorted(scores)
        wanted = set(steps[-self.newest :]) | self.pinned
        wanted |= {step for step in steps if self.every and step % self.every == 0}
        if self.best is not None:
            sign = 1 if self.best.mode == "max" else -1
            metric = self.best.metric
            ranked = sorted((sign * scores[step][metric], step) for step in steps if metric in scores[step])
            wanted |= {step for _, step in ranked[-self.best.count :]}
        return [step for step in steps if step not in wanted]
