"""The learning rate as a pure function of the step: nothing to save, nothing to advance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class LearningRate:
    """Linear warm-up, then constant, a half cosine, or stable and a linear decay (WSD, arXiv 2404.06395)."""

    kind: Literal["constant", "cosine", "wsd"]
    peak: float
    steps: int
    warmup: int
    decay: float
    """For ``wsd``: share of ``steps`` spent decaying."""
    final: float
    """Last learning rate as a share of ``peak``."""

    def __call__(self, step: int) -> float:
        """The learning rate of update ``step``, counted from 1 to ``steps``."""
        if step <= self.warmup:
            return self.peak * step / self.warmup
        if self.kind == "constant":
            return self.peak
        if self.kind == "cosine":
            progress = (step - self.warmup) / max(1, self.steps - self.warmup)
            share = 0.5 * (1.0 + math.cos(math.pi * progress))
        else:
            span = max(1, round(self.decay * self.steps))
            share = min(1.0, (self.steps - step) / span)
        return self.peak * (self.final + (1.0 - self.final) * share)

    def document(self, step: int) -> dict[str, str | int]:
        """Where update ``step`` stands, as trainer.json holds it; 0 is before the first, at no rate yet."""
        rate = self(step) if step else 0.0
        return {"kind": self.kind, "step": step, "steps": self.steps, "rate": repr(rate)}
