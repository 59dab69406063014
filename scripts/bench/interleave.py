"""Interleaved measuring: contenders take turns within one run, and each is compared with its own neighbour.

Machines drift by 10 % and more within minutes, so only ratios and differences of neighbours mean anything.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch


def rounds(
    contenders: Mapping[str, Callable[[], float]], count: int, *, settle: float = 0.0
) -> dict[str, list[float]]:
    """Call every contender once a round, in rotating order; returns name → one value a round.

    ``settle``: seconds of rest before each call.
    """
    names = list(contenders)
    values: dict[str, list[float]] = {name: [] for name in names}
    for number in range(count):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            time.sleep(settle)
            values[name].append(contenders[name]())
        print(f"round {number + 1} of {count}", end="\r", file=sys.stderr, flush=True)
    print("\x1b[K", end="", file=sys.stderr)
    return values


def ratios(values: Mapping[str, Sequence[float]], name: str, base: str) -> list[float]:
    """The value of ``name`` over that of ``base``, round by round."""
    return [one / other for one, other in zip(values[name], values[base], strict=True)]


@dataclass
class Pairs:
    """Times of single steps of a loop, each with the time of one step of the bare loop right after it.

    The loop fetches a batch once a step; ``fetched`` is called there and runs the bare step.
    """

    bare: Callable[[], object]
    loop_us: list[float] = field(default_factory=list)
    bare_us: list[float] = field(default_factory=list)
    _resumed: float = 0.0

    def fetched(self) -> None:
        """One step of the loop has ended, its next one begins after this call."""
        now = time.perf_counter()
        if self._resumed:
            self.loop_us.append(1e6 * (now - self._resumed))
        self.bare()
        self._resumed = time.perf_counter()
        if self.loop_us:
            self.bare_us.append(1e6 * (self._resumed - now))

    def settled(self) -> tuple[list[float], list[float]]:
        """Both lists without the first tenth."""
        skip = len(self.loop_us) // 10
        return self.loop_us[skip:], self.bare_us[skip : len(self.loop_us)]

    def added(self) -> list[float]:
        """µs that the loop's step takes longer than the bare one after it."""
        return [one - other for one, other in zip(*self.settled(), strict=True)]


def spread(numbers: Sequence[float], form: str) -> str:
    """The median, with the middle half in brackets."""
    low, high = (sorted(numbers)[round(share * (len(numbers) - 1))] for share in (0.25, 0.75))
    return f"{statistics.median(numbers):{form}} [{low:{form}} to {high:{form}}]"


def table(rows: Sequence[Sequence[str]]) -> str:
    """``rows``, the first of them the heads, in columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def verdict(text: str, value: float, limit: float, *, at_least: bool = False) -> str:
    """``text`` with whether ``value`` keeps ``limit``."""
    good = value >= limit if at_least else value <= limit
    return f"{'met   ' if good else 'MISSED'}  {text}"


def keep(path: Path | None, document: Mapping[str, object]) -> None:
    """Write ``document`` and what it was measured on to ``path``, if there is one."""
    if path is not None:
        machine = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
        path.write_text(json.dumps({**machine, **document}, indent=2) + "\n")
