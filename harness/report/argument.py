"""The sections that answer a question: what was asked, what varies over seeds, what differs, what holds."""

from __future__ import annotations

import math
import statistics as plain
from collections import Counter
from collections.abc import Iterator, Sequence

from harness.report import facts, statistics
from harness.report.arms import Arm, seeds_named
from harness.report.document import Block, Bullets, Heading, Paragraph, Status, Table
from harness.report.judge import ERROR_RATE, Judged
from harness.report.measured import Measure, Side
from harness.report.study import Study, failed

_NAMED = 10
"""Statements that are named with a claim."""
KINDS = {
    "supported": "good",
    "too broad": "open",
    "undecided": "open",
    "not supported": "bad",
    "no evidence": "bad",
}
"""Verdict → how it is marked."""


def question(study: Study) -> Iterator[Block]:
    """What was asked, and whether it was asked before the answer was seen."""
    if study.claims is None and not study.plans:
        return
    yield Heading(2, "Question")
    if study.claims is not None:
        if study.claims.question:
            yield Paragraph(study.claims.question)
        if study.claims.hypothesis:
            yield Paragraph(f"Hypothesis: {study.claims.hypothesis}")
        yield Bullets([f"{claim.name}: {claim.says}" for claim in study.claims.claims])
    if study.plans:
        yield Paragraph("The plan, as `sweep.json` of the sweep has it; no signature covers that file:")
        yield Bullets([*_plan(study)])


def _plan(study: Study) -> Iterator[str]:
    first, *later = study.plans
    yield f"planned {first.created}, before any member had run: {_planned(first.seeds, first.variants)}"
    for plan in later:
        yield (
            f"changed {plan.created}, when {plan.finished} members had finished: "
            f"{_planned(plan.seeds, plan.variants)}"
        )
    if any(plan.finished for plan in later):
        yield (
            "whoever adds runs after a look at the results has more than one chance of finding something; "
            "the intervals below do not correct for that"
        )
    if study.claims is not None:
        at = next((plan for plan in study.plans if plan.claims == study.claims.sha256), None)
        if at is None:
            yield "these claims were not registered with the sweep: they may be younger than the results"
        elif at.finished:
            yield f"these claims were registered {at.created}, when {at.finished} members had finished"
        else:
            yield f"these claims were registered {at.created}, before any member had finished"
    if study.absent:
        count = "1 planned member" if len(study.absent) == 1 else f"{len(study.absent)} planned members"
        yield f"{count} never began: {', '.join(study.absent[:5])}"


def _planned(seeds: Sequence[int], variants: Sequence[str]) -> str:
    names = ", ".join(name or "the config as it is" for name in variants)
    return f"seeds {', '.join(map(str, seeds))}; variants: {names}"


def uncertainty(study: Study) -> Iterator[Block]:
    """Mean, spread and intervals of every figure in every arm."""
    yield Heading(2, "Uncertainty and seeds")
    if not study.arms:
        yield Paragraph("No run has verified, so nothing is averaged.")
        return
    lone = facts.no_spread(study.arms[0].runs) if len(study.arms) == 1 else None
    if lone is not None:
        yield Paragraph(lone)
        return
    rows = [row for measure in study.measures for arm in study.arms for row in _spread(arm, measure)]
    yield Table(
        ["figure", "runs", "seeds", "mean", "standard deviation", "95 % t interval", "95 % bootstrap"],
        rows,
    )
    yield Paragraph(
        "Standard deviation of the sample. The t interval assumes roughly normal values; the bootstrap "
        "(bias-corrected, accelerated) needs at least four different ones. A figure is the last value of a "
        "run that finished; one with a suite in parentheses is of signed evaluations of the last step, which "
        "are listed with their digests under Evaluations of checkpoints."
    )
    notes = [*_uncounted(study)]
    notes += [text for measure in study.measures for arm in study.arms for text in _absent(arm, measure)]
    if notes:
        yield Bullets(notes)


def _uncounted(study: Study) -> Iterator[str]:
    """Runs that are in no number above."""
    bad = [run.name for run, each in zip(study.runs, study.verdicts, strict=True) if failed(each)]
    if bad:
        yield f"left out, since their verification failed: {', '.join(bad)}"
    for arm in study.arms:
        if len(facts.corpora(arm.runs)) > 1:
            yield f"{arm.label}: its runs were trained on {len(facts.corpora(arm.runs))} different corpora"
        seeds = Counter(facts.seed(run) for run in arm.runs)
        twice = [seed for seed, count in seeds.items() if count > 1]
        if twice:
            yield f"{arm.label}: several runs of {seeds_named(twice)}; of each the last one counts"


def _absent(arm: Arm, measure: Measure) -> Iterator[str]:
    """Which finished seeds have no value where others have one, and why."""
    side = measure.side(arm)
    reasons: dict[str, list[int]] = {}
    for each in side.without if side.values else ():
        reasons.setdefault(str(each.remark), []).append(facts.seed(each.run))
    for reason, seeds in reasons.items():
        yield f"{measure.label}, {arm.label}: {seeds_named(seeds)} left out: {reason}"


def _spread(arm: Arm, measure: Measure) -> Iterator[list[str]]:
    values = list(measure.side(arm).values.values())
    if not values:
        return
    mean = plain.fmean(values)
    seeds = len({facts.seed(run) for run in arm.runs})
    count = str(len(values)) if len(values) == seeds else f"{len(values)} of {seeds}"
    if len(values) == 1:
        yield [measure.label, arm.label, count, decimal(mean), "—", "—", "—"]
        return
    resampled = statistics.bootstrap_interval(values)
    yield [
        measure.label,
        arm.label,
        count,
        decimal(mean),
        decimal(plain.stdev(values)),
        str(statistics.mean_interval(values)),
        "—" if resampled is None else str(resampled),
    ]


def comparison(study: Study) -> Iterator[Block]:
    """Every arm against the first."""
    if len(study.arms) < 2:
        return
    empty = [arm for arm in study.arms if not any(each.side(arm).values for each in study.measures)]
    baseline = next((arm for arm in study.arms if arm not in empty), study.arms[0])
    others = [arm for arm in study.arms if arm is not baseline and arm not in empty]
    pairs = [
        (measure, measure.side(arm), measure.side(baseline)) for measure in study.measures for arm in others
    ]
    rows = [row for pair in pairs if not _apart(*pair) for row in _compared(*pair)]
    yield Heading(2, "Comparison with the baseline")
    yield Paragraph(
        f"The baseline is the first arm{' with a finished run' if baseline is not study.arms[0] else ''}: "
        f"{baseline.label}. A difference is an arm minus the baseline."
    )
    refused = [f"{arm.label} is not compared: no run of it has finished" for arm in empty]
    refused += _refused(pairs)
    if not rows:
        yield Paragraph("No arm has the two finished runs that an interval needs.")
        if refused:
            yield Bullets(refused)
        return
    head = [
        "figure",
        "runs",
        "difference",
        "95 % interval",
        "paired by seed",
        "effect size",
        "seeds needed",
    ]
    yield Table(head, rows)
    yield Paragraph(
        "Effect size: mean over standard deviation of the paired differences, else Hedges' g. Seeds needed: "
        f"in each arm, to find a true difference of this size with probability {statistics.POWER}. These "
        "intervals are not corrected for their number; those of the claims are."
    )
    if refused:
        yield Bullets(refused)


def _apart(measure: Measure, side: Side, baseline: Side) -> bool:
    """Whether a figure of metrics.jsonl is of other data on one side; a signed evaluation has its suite."""
    found = [each.run for one in (side, baseline) for each in one.found if each.value is not None]
    return measure.evaluation is None and len(facts.corpora(found)) > 1


def _refused(pairs: Sequence[tuple[Measure, Side, Side]]) -> list[str]:
    """Why there is no row where only one side was asked; measures with the same reason share a line."""
    reasons: dict[str, list[str]] = {}
    for measure, side, baseline in pairs:
        if side.values and _apart(measure, side, baseline):
            reason = f"{side.arm.label} and {baseline.arm.label} were measured on different corpora"
            reasons.setdefault(reason, []).append(measure.label)
        elif bool(side.values) != bool(baseline.values):
            has, lacks = (side, baseline) if side.values else (baseline, side)
            remark = f" ({lacks.without[0].remark})" if lacks.without else ""
            reason = f"{has.arm.label} has values, {lacks.arm.label} has none{remark}"
            reasons.setdefault(reason, []).append(measure.label)
    return [f"not compared: {', '.join(labels)}: {reason}" for reason, labels in reasons.items()]


def _compared(measure: Measure, side: Side, baseline: Side) -> Iterator[list[str]]:
    found = statistics.compare(side.values, baseline.values)
    if found is None:
        return
    needed = statistics.seeds_needed(found.difference, found.deviation, paired=found.paired)
    yield [
        measure.label,
        side.arm.label,
        f"{found.difference:+.4g}",
        str(found.interval),
        "yes" if found.paired else "no",
        "—" if found.effect is None else f"{found.effect:.2f}",
        f"more than {statistics.MOST_SEEDS:,}" if needed is None else str(needed),
    ]


def conclusion(study: Study) -> Iterator[Block]:
    """Each claim, its verdict, and the sentence that the evidence supports."""
    if not study.judged:
        return
    yield Heading(2, "Conclusion and its limits")
    for one in study.judged:
        yield Heading(3, one.claim.name)
        yield Status(KINDS[one.verdict], f"{one.verdict}: {one.claim.says}")
        yield Bullets([*_limits(one)])
    inferring = sum(one.claim.scope.seeds == "any" for one in study.judged)
    if inferring > 1:
        yield Paragraph(
            f"{inferring} claims share an error rate of {100 * ERROR_RATE:g} %: their intervals have the "
            f"level {100 * (1 - ERROR_RATE / inferring):.4g} % (Bonferroni)."
        )


def _limits(one: Judged) -> Iterator[str]:
    yield from one.reasons
    if one.seeds_needed is not None:
        yield (
            f"to decide it: about {one.seeds_needed} seeds in each arm, if the values seen are the true ones "
            f"(power {statistics.POWER})"
        )
    elif one.verdict == "undecided":
        yield "no number of seeds would decide it if the values seen are the true ones: they are the margin"
    if one.narrower is not None:
        yield f"what the evidence supports: {one.narrower}"
    if one.evidence:
        named = [f"{run.name} `{each.sha256[:12]}`" for run, each in one.evidence]
        more = f" and {len(named) - _NAMED} more (`--json` has all)" if len(named) > _NAMED else ""
        yield f"signed evaluations that it rests on, by sha256: {', '.join(named[:_NAMED])}{more}"


def failures(study: Study) -> Iterator[Block]:
    """What went wrong, and what was not found."""
    found = [
        f"{run.name}: {end.text}" for run in study.runs for end in [facts.ending(run)] if end.kind != "good"
    ]
    found += [f"`{name}`: planned, never began" for name in study.absent]
    found += [f"verification: {each.text}" for each in study.verdicts if each and each.kind != "good"]
    found += [
        f"{run.name}, `{each.checkpoint}`: an evaluation has failed: {', '.join(each.failed)}"
        for run, each in study.evaluations
        if each.facts["result"] == "FAILED"
    ]
    found += [
        f"{run.name}: {reason}"
        for run, tiers in zip(study.runs, study.tiers, strict=True)
        for reason in tiers.contradicted
    ]
    found += [f"claim {one.claim.name}: {one.verdict}" for one in study.judged if one.verdict != "supported"]
    yield Heading(2, "Failures and negative results")
    if found:
        yield Bullets(found)
    else:
        claimed = " and every claim is supported" if study.judged else ""
        yield Paragraph(f"Nothing to list: every run that was given has finished{claimed}.")
    if not any(study.verdicts):
        yield Paragraph(
            "What a verification or a signed evaluation would have to say against these runs is not known: "
            "give `--key` or `--policy`."
        )


_FALLING = ("loss", "bits_per_byte", "perplexity")
"""Figures that are the better the lower they are."""
_NOTED = 0.01
"""Share of a figure by which its last value must be worse than its best, to be noted."""


def observations(study: Study) -> Iterator[Block]:
    """What the curves show, in numbers: where figures ended, and where a run was better before its end."""
    noted = []
    for measure in study.measures:
        found = [each for arm in study.arms for each in measure.side(arm).found if each.value is not None]
        one_question = measure.evaluation is not None or len(facts.corpora(each.run for each in found)) == 1
        finite = sorted((each.value, each.run.name) for each in found if each.value is not None)
        if len(finite) > 1 and one_question:
            (low, first), (high, second) = finite[0], finite[-1]
            between = f"between {low:.4g} ({first}) and {high:.4g} ({second})"
            alike = f"at {low:.4g} in all {len(finite)} runs"
            noted.append(f"{measure.label} ended {alike if f'{low:.4g}' == f'{high:.4g}' else between}")
    for run in study.runs:
        for name in run.evaluation_names:
            points = [(value, step) for step, value in run.evaluation(name) if math.isfinite(value)]
            if name in _FALLING and points and points[-1][0] > min(points)[0] * (1 + _NOTED):
                best, step = min(points)
                noted.append(
                    f"{run.name}: held-out {name} was lowest at step {step:,.0f}, {best:.4g}; at the end it "
                    f"was {points[-1][0]:.4g}"
                )
    if noted:
        yield Heading(3, "Observations")
        yield Bullets(noted)


def decimal(value: float | None) -> str:
    """Four digits after the point, or words."""
    if value is None:
        return "—"
    return f"{value:.4f}" if math.isfinite(value) else "not finite"
