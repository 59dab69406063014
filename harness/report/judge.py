"""Claims held against runs: what the numbers say, and whether the claim says more than they do.

A verdict is one of:

- ``supported``: the interval lies wholly on the claim's side of its margin, and nothing makes it too broad
- ``too broad``: the numbers are on the claim's side, and it speaks of more than was looked at
- ``undecided``: the interval holds the margin
- ``not supported``: the interval lies wholly on the other side
- ``no evidence``: there are no runs to speak of, or their signed evaluations were asked different things

The level of the intervals is shared among all claims of a file (Bonferroni): a file with many claims must not
find something by their number alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Literal

from harness.audit.tiers.rules import Claim as Supported
from harness.report import facts, measured, statistics
from harness.report.arms import APART, Arm, chosen, seeds_named
from harness.report.claim_file import Claim
from harness.report.document import Status
from harness.report.runs import Evaluated, Run
from harness.report.statistics import Comparison, Interval
from harness.words import counted

Verdict = Literal["supported", "too broad", "undecided", "not supported", "no evidence"]

ERROR_RATE = 0.05
"""Probability that a file of claims finds anything where nothing is, at most."""
Values = Mapping[int, float]
"""Seed → last value of a metric."""

LEAST_SEEDS = 5
"""Seeds from which a claim may speak of any seed."""


@dataclass(frozen=True)
class Judged:
    """A claim and what the runs make of it."""

    claim: Claim
    verdict: Verdict
    reasons: tuple[str, ...]
    """Why it is not simply supported."""
    narrower: str | None
    """The widest sentence that the evidence does support; None without evidence."""
    interval: Interval | None
    comparison: Comparison | None
    seeds_needed: int | None
    """In each arm, to decide an undecided claim; None when it is decided, or when no number would do."""
    evidence: tuple[tuple[Run, Evaluated], ...] = ()
    """The signed evaluations whose values were used."""


def judge(
    claims: Sequence[Claim],
    runs: Sequence[Run],
    verdicts: Sequence[Status | None],
    absent: Sequence[str] = (),
) -> list[Judged]:
    """Hold each claim against ``runs``; ``verdicts`` has what a verification said of each run, ``absent`` the
    members that were planned with them and never began."""
    verified = {
        run.root for run, verdict in zip(runs, verdicts, strict=True) if verdict and verdict.kind == "good"
    }
    inferring = sum(claim.scope.seeds == "any" for claim in claims)
    level = 1 - ERROR_RATE / max(inferring, 1)
    unverified = {run.root for run in runs} - verified
    return [_judge(claim, runs, unverified, absent, level) for claim in claims]


def supporting(judged: Sequence[Judged], run: Run, runs: Sequence[Run]) -> Iterator[Supported]:
    """The claims over any seed that ``runs`` support, ``run`` among them; all verified, or they were too
    broad."""
    for one in judged:
        if one.verdict != "supported" or one.claim.scope.seeds != "any":
            continue
        arms = [chosen(runs, settings) for settings in (one.claim.of, one.claim.than) if settings is not None]
        used = [each for arm in arms for each in arm.runs]
        if any(each.root == run.root for each in used):
            seeds = min(len(side.values) for side in measured.sides(one.claim, arms))
            yield Supported(one.claim.name, seeds, len({_identity(each, "stack") for each in used}))


def _judge(
    claim: Claim, runs: Sequence[Run], unverified: set[Path], absent: Sequence[str], level: float
) -> Judged:
    arms = [chosen(runs, settings) for settings in (claim.of, claim.than) if settings is not None]
    sides = measured.sides(claim, arms)
    values = [side.values for side in sides]
    for side in sides:
        if not side.values:
            reason = f"no finished run with {side.arm.label} has a figure {claim.metric}"
            told = (f"{each.run.name}: {each.remark}" for each in side.found[:1])
            return Judged(claim, "no evidence", (": ".join((reason, *told)),), None, None, None, None)
    apart = measured.asked_differently(sides, any_data=claim.scope.data == "any")
    if apart:
        reason = f"its evaluations were asked different things, in {', '.join(apart[:5])}: not put together"
        return Judged(claim, "no evidence", (reason,), None, None, None, None)
    rests = tuple(measured.evidence(sides))
    narrow = [*_breadth(claim, sides, unverified)]
    if absent:
        # Whoever stops a sweep after a look at it has chosen what to count.
        named = f"{', '.join(absent[:3])}{' …' if len(absent) > 3 else ''}"
        narrow.append(f"{counted(len(absent), 'planned run')} never began: {named}")
    centre, interval, comparison = _measured(values, level)
    shown = _sentence(claim, arms, values, centre, interval)
    sign = -1 if claim.better == "lower" else 1
    # As a distance on the claim's side of its margin, whatever its direction.
    beyond = sign * centre - (claim.margin if claim.than is not None else sign * claim.margin)
    # A claim about these very runs is a matter of fact, not of inference.
    inferred = interval is not None and claim.scope.seeds == "any"
    half = (interval.high - interval.low) / 2 if interval is not None and inferred else 0.0
    if half and abs(beyond) <= half:
        alone = stdev(values[0].values()), True
        deviation, paired = (comparison.deviation, comparison.paired) if comparison else alone
        needed = statistics.seeds_needed(beyond, deviation, paired=paired, level=level)
        narrow.insert(0, f"the interval {interval} does not exclude the margin of {claim.margin:g}")
        return Judged(claim, "undecided", tuple(narrow), shown, interval, comparison, needed, rests)
    short = beyond < 0 or (beyond == 0 and claim.than is not None and claim.margin == 0)
    verdict: Verdict = "not supported" if short else "too broad" if narrow else "supported"
    return Judged(claim, verdict, tuple(narrow), shown, interval, comparison, None, rests)


def _measured(values: Sequence[Values], level: float) -> tuple[float, Interval | None, Comparison | None]:
    """The mean, or the difference of means; its interval; both arms compared."""
    first = list(values[0].values())
    if len(values) == 1:
        return fmean(first), statistics.mean_interval(first, level) if len(first) > 1 else None, None
    comparison = statistics.compare(values[0], values[1], level)
    if comparison is None:
        return fmean(first) - fmean(values[1].values()), None, None
    return comparison.difference, comparison.interval, comparison


def _breadth(claim: Claim, sides: Sequence[measured.Side], unverified: set[Path]) -> Iterator[str]:
    """Where the claim speaks of more than the runs show."""
    arms = [side.arm for side in sides]
    runs = [run for arm in arms for run in arm.runs]
    seeds = min(len(side.values) for side in sides)
    if claim.scope.seeds == "any" and seeds < LEAST_SEEDS:
        yield f"it speaks of any seed, and {counted(seeds, 'seed')} ran; {LEAST_SEEDS} are the least"
    for key, words, several in (("data", "corpus", "corpora"), ("stack", "stack", "stacks")):
        seen = {_identity(run, key) for run in runs}
        if getattr(claim.scope, key) == "any" and len(seen) < 2:
            yield f"it speaks of any {key}, and one {words} was used"
        elif getattr(claim.scope, key) == "same" and len(seen) > 1:
            yield f"its runs have {len(seen)} different {several}"
    if claim.scope.data == "any" and _crossed(sides):
        yield "its figures are of other data on one side than on the other"
    loose = [run.name for run in runs if run.root in unverified]
    if loose:
        yield f"{counted(len(loose), 'run')} not verified: {', '.join(loose[:3])}"
    lost = [f"{run.name} ({facts.ending(run).text})" for run in runs if facts.ending(run).kind != "good"]
    if lost:
        yield f"{len(lost)} of {counted(len(runs), 'run')} did not finish and are left out: {lost[0]}"
    remarks = [each for side in sides for each in side.found if each.remark is not None]
    none = [each for each in remarks if each.value is None]
    if none:
        left = ", ".join(each.run.name for each in none[:5])
        yield (
            f"{len(none)} of {counted(len(runs), 'run')} finished without a value of {claim.metric} and are "
            f"left out: {left}{' …' if len(none) > 5 else ''}: {none[0].remark}"
        )
    yield from (f"{each.run.name}: {each.remark}" for each in remarks if each.value is not None)
    twice = sum(len({facts.seed(run) for run in arm.runs}) < len(arm.runs) for arm in arms)
    if twice:
        yield "an arm has several runs of the same seed; the last one counts"
    yield from _confounded(claim, arms)
    yield from _measured_differently(claim, sides)


def _crossed(sides: Sequence[measured.Side]) -> bool:
    """Whether a seed has figures of metrics.jsonl on both sides, and other data on each."""
    data = [
        {facts.seed(each.run): _identity(each.run, "data") for each in side.found if not each.how}
        for side in sides
    ]
    return any(one[seed] != other[seed] for one, other in pairwise(data) for seed in {*one} & {*other})


def _measured_differently(claim: Claim, sides: Sequence[measured.Side]) -> Iterator[str]:
    """What is not alike in what signed evaluations were measured with, and the claim does not speak of."""
    tested = measured.datasets(sides)
    if claim.scope.data == "any" and len(tested) == 1:
        yield "it speaks of any data, and one dataset was evaluated"
    free = {"data": measured.DATA, "stack": measured.STACK}
    ignored = {name for key, names in free.items() if getattr(claim.scope, key) == "any" for name in names}
    if "precision" in {*claim.of, *(claim.than or {})}:
        ignored.add(measured.PRECISION)
    other = [name for name in measured.differing(sides) if name not in ignored]
    if other:
        yield f"its evaluations differ in {', '.join(other[:5])}"


def _confounded(claim: Claim, arms: Sequence[Arm]) -> Iterator[str]:
    """Differences that the claim does not name."""
    named = {*claim.of, *(claim.than or {})}
    runs = [run for arm in arms for run in arm.runs]
    other = [
        key for key, _ in facts.differing_settings(runs) if key not in named and not key.startswith(APART)
    ]
    if other:
        yield f"its runs also differ in {', '.join(other[:5])}"
    codes = {_identity(run, "code") for run in runs}
    if len(codes) > 1:
        yield f"its runs were made by {len(codes)} different versions of the code"


def _identity(run: Run, key: str) -> str:
    """What must be equal for two runs to have the same corpus, stack or code."""
    if run.newest is None:
        return "unknown"
    if key == "data":
        return str(run.newest["data"]["corpus_sha256"])
    if key == "stack":
        return json.dumps(run.newest["environment"].get("stack"), sort_keys=True, default=str)
    return json.dumps(
        {name: value for name, value in run.newest["code"].items() if name != "task"}, sort_keys=True
    )


def _sentence(
    claim: Claim, arms: Sequence[Arm], values: Sequence[Values], centre: float, interval: Interval | None
) -> str:
    """What was seen, no more."""
    seeds = sorted({seed for found in values for seed in found})
    where = f"With {seeds_named(seeds)}, on this corpus and stack,"
    doubt = "no interval" if interval is None else f"{interval.level * 100:.4g} % interval {interval}"
    name = claim.metric.replace("_", " ")
    if claim.than is None:
        return f"{where} the mean {name} of {arms[0].label} was {centre:.4g} ({doubt})."
    direction = "lower" if centre < 0 else "higher"
    return (
        f"{where} the mean {name} of {arms[0].label} was {abs(centre):.4g} {direction} than that of "
        f"{arms[1].label} ({doubt})."
    )
