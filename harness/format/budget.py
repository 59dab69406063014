"""What looking may cost a launch and has cost it, as `ledger.json` says it; and in words.

Example::

    >>> Budget(limit=10_000, spent=17_000, steps=400, digests=15_000).words
    'it cost 1.7 % of the time of 400 steps, of which step digests 1.5 %; the budget is 1 %'
    >>> Budget(limit=10_000, spent=17_000, steps=400, digests=15_000).reason[:45]
    'step digests alone take more than the budget:'
"""

from __future__ import annotations

from dataclasses import dataclass

from harness.words import counted

_PERCENT = 10_000
"""Millionths."""


@dataclass(frozen=True)
class Budget:
    """What looking may cost, and has cost in the newest launch, in millionths of the time of its steps."""

    limit: int
    spent: int
    steps: int
    """Steps of the launch by then."""
    digests: int | None = None
    """Of ``spent``, the step digests after the first step, which come at the steps that the config says,
    whatever is left of the budget; the rest is looking, which waits for it. None in earlier ledgers."""

    @property
    def words(self) -> str:
        """What was spent, on what, of how much."""
        digests = "" if self.digests is None else f", of which step digests {percent(self.digests)}"
        return (
            f"it cost {percent(self.spent)} of the time of {counted(self.steps, 'step')}{digests}; "
            f"the budget is {percent(self.limit)}"
        )

    @property
    def reason(self) -> str | None:
        """Why more was spent than was allowed and what to do; None where it was not, or nobody knows why."""
        if self.spent <= self.limit or self.digests is None:
            return None
        if self.digests > self.limit:
            return f"step digests alone take more than the budget: {remedy(self.digests, self.limit)}"
        return (
            "the first census and the first double execution come in any case: "
            "a launch of more steps pays for them"
        )


def remedy(digests: int, limit: int) -> str:
    """What brings step digests that cost ``digests`` under ``limit``, of the same unit."""
    times = -(-digests // max(1, limit))
    return (
        f"they come at the steps that the config says; steps of {times} times the samples, or "
        f"determinism.gradients_every and determinism.state_every {times} times as large, bring them under it"
    )


def percent(millionths: int) -> str:
    """``1.7 %``."""
    return f"{millionths / _PERCENT:.2g} %"
