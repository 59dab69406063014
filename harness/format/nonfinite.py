"""A loss or gradient norm that was not finite, as `ledger.json` tells what was found out about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

AGAIN = ("same bits", "other bits", "finite", "elsewhere", "not executed")
"""What a rank's second execution of an update gave that was not finite: that again, with the losses it had or
with others; finite numbers; finite numbers on this rank and not on another; or none was made."""
COMPILED, COLLECTIVE = "compiled region", "collective"
UNSEEN = (COMPILED, COLLECTIVE)
"""What stands in place of an operator when none that could be seen has made a value that is not finite."""


@dataclass(frozen=True)
class NonFinite:
    """A loss or gradient norm that was not finite, and what a rank's second execution has shown."""

    step: int
    what: str
    """``the loss of step 9 is nan``."""
    rank: int
    again: str
    """One of `AGAIN`."""
    micro_batch: int | None
    """Of the rank's, from 0, in which it came back, or that was looked at."""
    op: str | None
    """The first operator that returned it out of finite arguments or, when it did not come back, the one that
    does not repeat its bits; None when neither was found."""
    module: str | None
    call_site: str | None
    source: str
    """How that is known, or why nothing is."""

    @property
    def place(self) -> str | None:
        """``aten.log in `head` at model.py:12 forward``."""
        if self.op is None:
            return None
        inside = "" if self.module is None else f" in `{self.module}`"
        return f"{self.op}{inside}" + ("" if self.call_site is None else f" at {self.call_site}")

    @property
    def told(self) -> str:
        """What the second execution has shown, in one sentence."""
        where = "" if self.micro_batch is None else f" in micro-batch {self.micro_batch} of rank {self.rank}"
        if self.again == "not executed":
            return f"not executed again: {self.source}"
        if self.again == "elsewhere":
            return f"executed again on rank {self.rank} it did not begin there: {self.source}"
        if self.again == "finite":
            but = "" if self.place is None else f"{self.place} does not repeat its bits: "
            return f"executed again{where} it did not come back: {but}{self.source}"
        bits = "the same bits" if self.again == "same bits" else self.again
        place = "" if self.place is None else f" from {self.place}"
        return f"executed again{where} it came back with {bits}{place}: {self.source}"

    @property
    def remedy(self) -> str:
        """What to do next."""
        if self.op is not None and ("uninitialised" in self.source or self.again == "finite"):
            return (
                "repair it, or use what `harness kernels` there names instead; then the same command goes on"
            )
        if self.op is not None:
            return "look at what it is given; lower optimizer.lr or change the data, in a new run.dir"
        return "look there; lower optimizer.lr or change the data, in a new run.dir"


def foremost(found: Sequence[NonFinite]) -> list[NonFinite]:
    """Those of the ranks on which the value began, at an operator that was seen if there is one."""
    here = [each for each in found if each.again != "elsewhere"]
    named = [each for each in here if each.op is not None]
    seen = [each for each in named if each.op not in UNSEEN]
    return seen or named or here or list(found)
