"""The report of one or more runs: blocks in reading order, from curves to configs.

Example::

    blocks = compose([read(Path("runs/tiny"))], [None])
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

from harness.audit.kernels import not_looked_at
from harness.errors import VerificationFailed
from harness.report import claims, figure
from harness.report.document import Block, Bullets, Heading, Paragraph, Picture, Source, Status, Table
from harness.report.figure import Figure, Mark, Series
from harness.report.runs import Facts, Run, printable

_INCIDENTS = 20
_NAMED_IN_TITLE = 3
_SMOOTHED_SHARE = 50
"""The training loss is shown as a mean over this fraction of its steps, with the raw curve behind."""


def compose(runs: Sequence[Run], verdicts: Sequence[Status | None]) -> list[Block]:
    """The whole report. ``verdicts`` has what a verification said of each run, None when there was none."""
    several = len(runs) > 1
    listed = f": {', '.join(run.name for run in runs)}" if len(runs) <= _NAMED_IN_TITLE else ""
    title = f"{len(runs)} runs{listed}" if several else f"Run {runs[0].name}"
    return [
        Heading(1, title),
        *(
            status
            for run, verdict in zip(runs, verdicts, strict=True)
            for status in _standing(run, verdict, several)
        ),
        *([] if any(verdicts) else [Status("open", "not verified: give `--key` or `--policy`")]),
        *_pictures(runs),
        Heading(2, "Results"),
        _results(runs),
        *_over_seeds(runs),
        *_settings(runs),
        Heading(2, "Launches and resumes"),
        *(block for run in runs for block in _launches(run, several)),
        Heading(2, "Order-dependent kernels"),
        *(block for run in runs for block in _kernels(run, several)),
        Heading(2, "Warnings and errors"),
        *(block for run in runs for block in _incidents(run, several)),
        Heading(2, "What could still vary"),
        *(block for run in runs for block in _named(run, several, [Bullets(claims.could_vary(run))])),
        *_repetition(runs),
        Heading(2, "Environment and code"),
        *(block for run in runs for block in _named(run, several, _environment(run))),
        Heading(2, "Configs"),
        *(Source(f"{run.name}: run.yaml", run.config_text or "(missing)") for run in runs),
    ]


def summary(run: Run) -> str:
    """One run in one line for a terminal."""
    loss = claims.final(run, "loss (train)")
    shown = [claims.ending(run).text]
    if loss is not None:
        shown.append(f"training loss {_decimal(loss)}")
    shown += [f"{name} {_decimal(claims.final(run, name))}" for name in run.evaluation_names]
    resumes = [one for one in claims.segments(run) if one.resumed_from is not None]
    if resumes:
        shown.append(f"{_count(len(resumes), 'resume')} ({', '.join(one.kind for one in resumes)})")
    return printable(f"{run.name}: {'; '.join(shown)}")


def loss_figure(runs: Sequence[Run]) -> Figure:
    """Training loss of all runs, with evaluations in it when there is a single run."""
    curves: list[Series] = []
    for index, run in enumerate(runs):
        raw = run.curve("loss")
        window = max(1, len(raw) // _SMOOTHED_SHARE)
        label = "train" if len(runs) == 1 else run.name
        if window > 1:
            curves.append(Series("", raw, index, faint=True))
            label += f" (mean of {window} steps)"
        curves.append(Series(label, figure.trailing_mean(raw, window), index))
        if len(runs) == 1 and run.evaluation("loss"):
            curves.append(Series("held out", run.evaluation("loss"), index + 1, dots=True))
    return Figure("Loss", "step", "loss", tuple(curves), _resume_marks(runs))


def _pictures(runs: Sequence[Run]) -> Iterator[Block]:
    if not any(run.lines for run in runs):
        yield Paragraph("No step has been recorded, so there are no curves.")
        return
    yield _picture(loss_figure(runs), "loss.svg")
    for name in dict.fromkeys(name for run in runs for name in run.evaluation_names):
        if name != "loss" or len(runs) > 1:
            yield _picture(_evaluation_figure(runs, name), f"evaluation-{_slug(name)}.svg")
    yield _picture(_rate_figure(runs), "throughput.svg")


def _slug(name: str) -> str:
    """``name`` as part of a file's name: the name comes from a run folder and could be anything."""
    return "".join(letter if letter.isalnum() and letter.isascii() else "-" for letter in name)[:40]


def _picture(drawn: Figure, file: str) -> Picture:
    return Picture(figure.draw(drawn), file, f"{drawn.title} over {drawn.x_label}s")


def _evaluation_figure(runs: Sequence[Run], name: str) -> Figure:
    curves = tuple(
        Series(_label(run, runs), run.evaluation(name), index, dots=True) for index, run in enumerate(runs)
    )
    words = name.replace("_", " ")
    return Figure(f"Held-out {words}", "step", words, curves, _resume_marks(runs))


def _rate_figure(runs: Sequence[Run]) -> Figure:
    unit = runs[0].unit
    curves = tuple(
        Series(_label(run, runs), run.curve(f"{run.unit}s_per_s"), index) for index, run in enumerate(runs)
    )
    return Figure("Throughput", "step", f"{unit}s per second", curves, _resume_marks(runs), from_zero=True)


def _label(run: Run, runs: Sequence[Run]) -> str:
    """Name of a curve; a single run needs none."""
    return run.name if len(runs) > 1 else ""


def _resume_marks(runs: Sequence[Run]) -> tuple[Mark, ...]:
    return tuple(
        Mark(float(one.resumed_from), f"resume ({one.kind})")
        for run in runs
        for one in claims.segments(run)
        if one.resumed_from is not None
    )


def _standing(run: Run, verdict: Status | None, several: bool) -> Iterator[Block]:
    prefix = f"{run.name}: " if several else ""
    end = claims.ending(run)
    yield Status(end.kind, f"{prefix}{end.text}")
    if verdict is not None:
        yield verdict


def _results(runs: Sequence[Run]) -> Table:
    names = list(dict.fromkeys(name for run in runs for name in run.evaluation_names))
    head = [
        "run",
        "seed",
        "steps",
        "training loss",
        *(f"held-out {name}" for name in names),
        "per second (median)",
    ]
    rows = []
    for run in runs:
        seed = (
            run.newest["run"]["seed"]
            if run.newest
            else claims.settings(run.config_text, str(run.root)).get("run.seed", "—")
        )
        rate = claims.rate(run)
        rows.append(
            [
                run.name,
                str(seed),
                f"{run.last_step:,}",
                _decimal(claims.final(run, "loss (train)")),
                *(_decimal(claims.final(run, name)) for name in names),
                "—" if rate is None else f"{rate:,.0f} {run.unit}s",
            ]
        )
    return Table(head, rows)


def _over_seeds(runs: Sequence[Run]) -> Iterator[Block]:
    if claims.no_spread(runs) is not None:
        return
    names = list(dict.fromkeys(name for run in runs for name in run.evaluation_names))
    rows = []
    for name in ("loss (train)", *names):
        values = [claims.final(run, name) for run in runs]
        known = tuple(value for value in values if value is not None)
        rows.append([name, str(len(known)), claims.Summary(name, known).text])
    yield Heading(3, "Over seeds")
    yield Table(["last value of", "runs", "mean ± sample standard deviation"], rows)


def _settings(runs: Sequence[Run]) -> Iterator[Block]:
    differing = claims.differing_settings(runs)
    if differing:
        yield Heading(3, "Settings that differ")
        yield Table(
            ["key", *(run.name for run in runs)], [[f"`{key}`", *values] for key, values in differing]
        )


def _repetition(runs: Sequence[Run]) -> Iterator[Block]:
    reason = claims.no_spread(runs)
    if reason is not None:
        yield Paragraph(reason)


def _launches(run: Run, several: bool) -> list[Block]:
    found = claims.segments(run)
    if not found:
        return _named(run, several, [Paragraph("No checkpoint with a readable statement.")])
    head = ["launch", "class", "resumed from", "checkpoints", "processes", "launcher", "precision"]
    rows = [
        [
            str(one.number),
            one.kind,
            "—" if one.resumed_from is None else f"{one.resumed_from:,}",
            f"{one.first:,} … {one.last:,}",
            str(one.launch.get("world_size", "—")),
            str(one.launch.get("launcher", "—")),
            str(one.launch.get("precision", "—")),
        ]
        for one in found
    ]
    remarks = [f"launch {one.number} differs: {text}" for one in found for text in one.differences]
    remarks += [f"launch {one.number} accepted: {text}" for one in found for text in one.accepted]
    remarks += [f"launch {one.number} skipped {text}" for one in found for text in one.skipped]
    remarks += [
        f"`{one.name}`: {one.kind}" for one in run.checkpoints if one.kind in ("nonfinite", "damaged")
    ]
    remarks += [f"`{one.name}`: {one.problem}" for one in run.checkpoints if one.problem]
    if run.superseded:
        remarks.append(
            f"{_count(run.superseded, 'step')} ran again after a resume; their first lines are in events/"
        )
    return _named(run, several, [Table(head, rows), *([Bullets(remarks)] if remarks else [])])


def _kernels(run: Run, several: bool) -> list[Block]:
    try:
        ledger = claims.newest_ledger(run)
    except VerificationFailed as error:
        return _named(run, several, [Status("bad", claims.problem(error))])
    if ledger is None:
        return _named(run, several, [Paragraph("No checkpoint holds a ledger.")])
    blocks: list[Block] = []
    if ledger.rows:
        rows = [
            [
                f"`{row.op}`",
                row.backend,
                row.dtype,
                row.evidence,
                f"{row.count:,}",
                f"{row.first_step:,} … {row.last_step:,}",
                row.alternative or "—",
            ]
            for row in ledger.rows
        ]
        blocks.append(Table(["operator", "backend", "dtype", "evidence", "seen", "steps", "instead"], rows))
    else:
        blocks.append(Paragraph("None was seen, as far as was looked:"))
    blocks.append(Bullets(not_looked_at(ledger)))
    return _named(run, several, blocks)


def _incidents(run: Run, several: bool) -> list[Block]:
    notes = claims.missing_steps(run)
    if run.unreadable:
        notes.append(f"{_count(run.unreadable, 'line')} of metrics.jsonl cannot be read")
    if run.partial:
        notes.append("metrics.jsonl ends inside a line: it is being written, or its writer was cut off")
    shown = run.incidents[-_INCIDENTS:]
    blocks: list[Block] = [Bullets(notes)] if notes else []
    if shown:
        rows = [[_clock(one.time), str(one.rank), one.level, one.event, one.text] for one in shown]
        blocks.append(Table(["time (UTC)", "rank", "level", "event", "what"], rows))
    if len(run.incidents) > len(shown):
        blocks.append(Paragraph(f"The last {len(shown)} of {len(run.incidents)}; all are in events/."))
    return _named(run, several, blocks or [Paragraph("None.")])


def _environment(run: Run) -> list[Block]:
    facts = run.newest
    if facts is None:
        return [Paragraph("Not known: no checkpoint has a readable statement.")]
    return [Table(["what", "value"], [[name, value] for name, value in _environment_rows(facts)])]


def _environment_rows(facts: Facts) -> Iterator[tuple[str, str]]:
    code, data = facts["code"], facts["data"]
    state = {True: " with uncommitted changes", False: "", None: " (state unknown)"}[code.get("dirty")]
    yield "harness", str(code.get("harness"))
    yield "code", f"`{str(code.get('git_commit') or 'not a git checkout')[:12]}`{state}"
    yield "data", f"{data.get('kind')}, corpus `{str(data.get('corpus_sha256'))[:16]}`"
    for name, value in facts["environment"].items():
        if isinstance(value, str | int | bool):
            yield name.replace("_", " "), str(value)
    found = facts["environment"].get("packages")
    packages = found if isinstance(found, dict) else {}
    for name in ("torch", "accelerate", "numpy", "safetensors"):
        if name in packages:
            yield name, str(packages[name])
    yield "state", f"`{str(facts.get('state', {}).get('sha256'))[:16]}`"


def _named(run: Run, several: bool, blocks: Sequence[Block]) -> list[Block]:
    return [Heading(3, run.name), *blocks] if several else list(blocks)


def _decimal(value: float | None) -> str:
    if value is None:
        return "—"
    return f"{value:.4f}" if math.isfinite(value) else "not finite"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _clock(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S") if seconds else "—"
