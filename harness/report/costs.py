"""What runs have cost: time at work, processes, and what the devices were."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import median

from harness.report.document import Block, Heading, Paragraph, Table
from harness.report.runs import Run
from harness.words import human_seconds

_PAUSE = 20.0
"""A gap between two steps longer than this many median steps is a pause (killed, queued), not work."""


def seconds_at_work(run: Run) -> float | None:
    """From the first line of metrics.jsonl to the last, without pauses; None with fewer than three lines."""
    clocks = [float(line["time"]) for line in run.lines if isinstance(line.get("time"), int | float)]
    gaps = [after - before for before, after in pairwise(clocks)]
    gaps = [gap for gap in gaps if math.isfinite(gap) and gap >= 0]
    if len(gaps) < 2:
        return None
    usual = median(gaps)
    return sum(gap for gap in gaps if gap <= max(_PAUSE * usual, 1.0))


def processes(run: Run) -> int | None:
    """Ranks of the newest launch; None when no statement can be read."""
    return None if run.newest is None else int(run.newest["launch"]["world_size"])


def device(run: Run) -> str:
    """What the ranks computed on, as the newest statement tells."""
    if run.newest is None:
        return "not recorded"
    facts = run.newest["environment"]
    stack = facts.get("stack")
    named = stack.get("device") if isinstance(stack, dict) else None
    return str(named or facts.get("cpu") or "not recorded")


def energy(run: Run) -> str:
    """Watt hours by what counted them."""
    told = (f"{joules / 3600:.3g} Wh ({source})" for source, joules in run.energy.items())
    return "; ".join(told) or "not recorded"


def costs(runs: Sequence[Run]) -> Iterator[Block]:
    """Hours of each run and of all."""
    yield Heading(2, "Costs")
    rows, total, known = [], 0.0, 0
    for run in runs:
        seconds, ranks = seconds_at_work(run), processes(run)
        hours = None if seconds is None or ranks is None else seconds * ranks / 3600
        total, known = total + (hours or 0.0), known + (hours is not None)
        rows.append(
            [
                run.name,
                device(run),
                "not recorded" if ranks is None else str(ranks),
                "not recorded" if seconds is None else human_seconds(seconds),
                "not recorded" if hours is None else f"{hours:.3g}",
                energy(run),
                f"{run.superseded:,}",
            ]
        )
    head = ["run", "device", "processes", "time at work", "process hours", "energy", "steps that ran twice"]
    yield Table(head, rows)
    counted = sum(bool(run.energy) for run in runs)
    more = ", steps that no checkpoint has signed" if any(run.unsigned for run in runs) else ""
    yield Paragraph(
        (
            f"{total:.3g} process hours of {known} of {len(runs)} runs, from the clocks in metrics.jsonl; a "
            f"process has one GPU, if any. Start-up, pauses, steps that ran again{more} are left out. "
            if known
            else "Process hours are not recorded: a run shows its pace from its third step on. "
        )
        + (
            f"Energy of {counted} of {len(runs)} runs, as their devices counted it; covered by no signature."
            if counted
            else "Energy is not recorded: no device reported it."
        )
    )
