"""The curves of a report: a run's own, or the mean of each config with the band of its seeds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from statistics import fmean

from harness.errors import VerificationFailed
from harness.format.ledger import EVIDENCE
from harness.report import facts, figure, spans
from harness.report.arms import Arm
from harness.report.curves import Point, trailing_mean
from harness.report.document import Block, Paragraph, Picture
from harness.report.figure import Band, Figure, Mark, Series
from harness.report.runs import Run
from harness.report.spans import Row, Span
from harness.report.study import Study

_SMOOTHED_SHARE = 50
"""The training loss is shown as a mean over this fraction of its steps, with the raw curve behind."""


def loss_figure(study: Study) -> Figure:
    """Training loss: of a run with its evaluations, or of each arm as a mean with the band of its seeds."""
    if _repeated(study):
        return _banded("Loss", "loss", study.arms, lambda run: run.curve("loss"))
    runs = study.runs
    curves: list[Series] = []
    for index, run in enumerate(runs):
        raw = run.curve("loss")
        window = max(1, len(raw) // _SMOOTHED_SHARE)
        label = "train" if len(runs) == 1 else run.name
        if window > 1:
            curves.append(Series("", raw, index, faint=True))
            label += f" (mean of {window} steps)"
        curves.append(Series(label, trailing_mean(raw, window), index))
        if len(runs) == 1 and run.evaluation("loss"):
            curves.append(Series("held out", run.evaluation("loss"), index + 1, dots=True))
    return Figure("Loss", "step", "loss", tuple(curves), _resume_marks(runs))


def _repeated(study: Study) -> bool:
    """Whether some config ran more than once, so that curves are means with a band."""
    return any(len(arm.runs) > 1 for arm in study.arms)


def _banded(
    title: str, words: str, arms: Sequence[Arm], curve_of: Callable[[Run], tuple[Point, ...]]
) -> Figure:
    """Means over the runs that finished; one that did not would cut them off, and has a line of its own."""
    series, bands = [], []
    for index, arm in enumerate(arms):
        whole = [run for run in arm.runs if facts.ending(run).kind == "good"] or list(arm.runs)
        series += [
            Series(f"{run.name} (not finished)", curve_of(run), index, len(curve_of(run)) == 1, faint=True)
            for run in arm.runs
            if run not in whole and curve_of(run)
        ]
        curves = [curve_of(run) for run in whole]
        if not all(curves):
            continue
        window = max(1, max(map(len, curves)) // _SMOOTHED_SHARE)
        smooth = [dict(trailing_mean(curve, window)) for curve in curves]
        common = sorted(set(smooth[0]).intersection(*smooth[1:]))
        rows = [(x, [curve[x] for curve in smooth]) for x in common]
        count = f"mean of {len(curves)} runs" if len(curves) > 1 else "one run"
        shown = f"{arm.label} ({count}{f', of {window} steps' if window > 1 else ''})"
        # A line through one point would not be seen.
        means = tuple((x, fmean(values)) for x, values in rows)
        series.append(Series(shown, means, index, dots=len(rows) == 1))
        if len(curves) > 1:
            bands.append(Band(tuple((x, min(values), max(values)) for x, values in rows), index))
    return Figure(
        f"{title}: mean, with the lowest and highest run",
        "step",
        words,
        tuple(series),
        (),
        False,
        tuple(bands),
    )


def pictures(study: Study) -> Iterator[Block]:
    """Loss, each evaluation figure, throughput."""
    runs = study.runs
    if not any(run.lines for run in runs):
        yield Paragraph("No step has been recorded, so there are no curves.")
        return
    yield _picture(loss_figure(study), "loss.svg")
    names = list(dict.fromkeys(name for run in runs for name in run.evaluation_names))
    # A single run's held-out loss is in the picture of its loss.
    names = [name for name in names if name != "loss" or len(runs) > 1]
    once = [name for name in names if all(len(run.evaluation(name)) < 2 for run in runs)]
    for name in names:
        if name not in once:
            yield _picture(_evaluation_figure(study, name), f"evaluation-{_slug(name)}.svg")
    if once:
        yield Paragraph(f"Measured once, so without a curve: held-out {', '.join(once)}.")
    yield _picture(_rate_figure(study), "throughput.svg")


def _slug(name: str) -> str:
    """``name`` as part of a file's name: the name comes from a run folder and could be anything."""
    return "".join(letter if letter.isalnum() and letter.isascii() else "-" for letter in name)[:40]


def _picture(drawn: Figure, file: str) -> Picture:
    pair = figure.draw(drawn), figure.draw(drawn, figure.NARROW)
    return Picture(*pair, file, f"{drawn.title} over {drawn.x_label}s")


def _evaluation_figure(study: Study, name: str) -> Figure:
    words = name.replace("_", " ")
    if _repeated(study):
        return _banded(f"Held-out {words}", words, study.arms, lambda run: run.evaluation(name))
    runs = study.runs
    curves = tuple(
        Series(_label(run, runs), run.evaluation(name), index, dots=True)
        for index, run in enumerate(runs)
        if run.evaluation(name)
    )
    marks = _resume_marks(runs, lambda run: bool(run.evaluation(name)))
    return Figure(f"Held-out {words}", "step", words, curves, marks)


def _rate_figure(study: Study) -> Figure:
    runs, unit = study.runs, study.runs[0].unit
    words = f"{unit}s per second"
    if _repeated(study):
        made = _banded("Throughput", words, study.arms, lambda run: run.curve(f"{unit}s_per_s"))
        return replace(made, from_zero=True)
    curves = tuple(
        Series(_label(run, runs), run.curve(f"{run.unit}s_per_s"), index) for index, run in enumerate(runs)
    )
    return Figure("Throughput", "step", words, curves, _resume_marks(runs), from_zero=True)


_CLASSES = ("genesis", "exact", "same-data", "accepted")
"""Of launches, in the order of their colours."""
_MOST_ROWS = 40


def launches(study: Study) -> Iterator[Block]:
    """Which launch made which steps of each run, unless each had one that went to the end."""
    rows = []
    for run in study.runs:
        found = facts.segments(run)
        bars = tuple(Span(float(one.resumed_from or 0), float(one.last), one.kind) for one in found)
        if bars:
            rows.append(Row(run.name, bars))
    if any(len(row.spans) > 1 for row in rows) or len({row.spans[-1].end for row in rows}) > 1:
        yield from _chart(study, "Launches, by the class of their resume", "launches.svg", rows, _CLASSES)


def kernels(study: Study) -> Iterator[Block]:
    """From which step to which each order-dependent operator was seen, over all runs."""
    seen: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for run in study.runs:
        with contextlib.suppress(VerificationFailed):  # the section says so itself
            ledger = facts.newest_ledger(run)
            for row in () if ledger is None else ledger.rows:
                seen.setdefault((row.op, row.evidence), []).append((row.first_step, row.last_step))
    rows = [
        Row(op, (Span(float(min(first for first, _ in steps)), float(max(last for _, last in steps)), kind),))
        for (op, kind), steps in seen.items()
    ]
    if rows:
        yield from _chart(study, "Operators of the ledger, by evidence", "kernels.svg", rows, EVIDENCE)


def _chart(study: Study, title: str, file: str, rows: Sequence[Row], kinds: Sequence[str]) -> Iterator[Block]:
    last = max(run.last_step for run in study.runs)
    wide, narrow = (
        spans.draw(title, rows[:_MOST_ROWS], kinds, last, width) for width in (figure.WIDTH, figure.NARROW)
    )
    yield Picture(wide, narrow, file, f"{title}, over steps")
    if len(rows) > _MOST_ROWS:
        yield Paragraph(f"The first {_MOST_ROWS} of {len(rows):,} rows; the tables have all.")


def _label(run: Run, runs: Sequence[Run]) -> str:
    """Name of a curve; a single run needs none."""
    return run.name if len(runs) > 1 else ""


def _resume_marks(runs: Sequence[Run], drawn: Callable[[Run], bool] = lambda run: True) -> tuple[Mark, ...]:
    """Of those ``runs`` that have a curve."""
    return tuple(
        Mark(
            float(one.resumed_from),
            f"{run.name}: resume ({one.kind})" if len(runs) > 1 else f"resume ({one.kind})",
        )
        for run in filter(drawn, runs)
        for one in facts.segments(run)
        if one.resumed_from is not None
    )
