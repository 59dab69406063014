"""The report of one or more runs: blocks in reading order, from curves to configs.

Example::

    blocks = compose(study([read(Path("runs/tiny"))], [None]))
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Literal

from harness.audit.kernels import not_looked_at
from harness.audit.tiers.text import lines as tier_lines
from harness.errors import VerificationFailed, visible
from harness.format import layout
from harness.report import argument, artefacts, checklist, costs, data, evaluations, facts, setup
from harness.report.argument import decimal
from harness.report.arms import alike, listed
from harness.report.document import Block, Bullets, Heading, Paragraph, Source, Status, Table
from harness.report.pictures import kernels, launches, pictures
from harness.report.runs import Facts, Run
from harness.report.study import Study, failed
from harness.words import counted

_INCIDENTS = 20
_NAMED_IN_TITLE = 3


def compose(study: Study, made: str | None = None) -> list[Block]:
    """The whole report, in the order in which a reader asks; ``made``: when and by what, below the title."""
    runs = study.runs
    named = f": {', '.join(run.name for run in runs)}" if len(runs) <= _NAMED_IN_TITLE else ""
    return [
        Heading(1, f"{len(runs)} runs{named}" if study.several else f"Run {runs[0].name}"),
        *([] if made is None else [Paragraph(made)]),
        *_standing(study),
        *([] if any(study.verdicts) else [Status("open", "not verified: give `--key` or `--policy`")]),
        *_claimed(study),
        *argument.question(study),
        Heading(2, "Setup"),
        *setup.blocks(study),
        *data.blocks(study),
        Heading(2, "Results"),
        *_other_data(study),
        *pictures(study),
        _results(study),
        *argument.observations(study),
        *argument.uncertainty(study),
        *argument.comparison(study),
        *argument.conclusion(study),
        *argument.failures(study),
        Heading(2, "Evaluation protocol"),
        *_each(study, _protocol),
        *evaluations.blocks(study),
        Heading(2, "Artefact provenance"),
        *artefacts.blocks(study),
        Heading(2, "Launches and resumes"),
        *launches(study),
        *_each(study, _launches),
        Heading(2, "Order-dependent kernels"),
        *kernels(study),
        *_each(study, _kernels),
        Heading(2, "Warnings and errors"),
        *_each(study, _incidents),
        Heading(2, "What could still vary"),
        *_each(study, partial(_variations, study)),
        Heading(2, "Environment and code"),
        *_each(study, _environment),
        *costs.costs(runs),
        *checklist.blocks(study),
        Heading(2, "Configs"),
        *_configs(runs),
    ]


def summary(run: Run) -> str:
    """One run in one line for a terminal."""
    loss = facts.final(run, "loss (train)")
    shown = [facts.ending(run).text]
    if loss is not None:
        shown.append(f"training loss {decimal(loss)}")
    shown += [f"{name} {decimal(facts.final(run, name))}" for name in run.evaluation_names]
    resumes = [one for one in facts.segments(run) if one.resumed_from is not None]
    if resumes:
        shown.append(f"{counted(len(resumes), 'resume')} ({', '.join(one.kind for one in resumes)})")
    return visible(f"{run.name}: {'; '.join(shown)}")


def _standing(study: Study) -> Iterator[Block]:
    """How each run ended and what verification says; runs of which the same is true share a line."""
    told: dict[tuple[str, str], list[str]] = {}
    for run, verdict in zip(study.runs, study.verdicts, strict=True):
        end = facts.ending(run)
        for status in (Status(end.kind, end.text), verdict):
            if status is not None:
                text = status.text.removeprefix(f"{run.name}: ")
                told.setdefault((status.kind, text), []).append(run.name)
    for (kind, text), names in told.items():
        yield Status(kind, f"{listed(names)}: {text}" if study.several else text)


def _claimed(study: Study) -> Iterator[Block]:
    """How many claims have which verdict."""
    counts = Counter(one.verdict for one in study.judged)
    if counts:
        kinds = {argument.KINDS[verdict] for verdict in counts}
        kind = next(each for each in ("bad", "open", "good") if each in kinds)
        yield Status(kind, f"claims: {', '.join(f'{count} {verdict}' for verdict, count in counts.items())}")


def _each(study: Study, section: Callable[[Run], list[Block]]) -> list[Block]:
    """``section`` of every run; runs of which the same is to be said share it."""
    if not study.several:
        return section(study.runs[0])
    made = alike((section(run), run.name) for run in study.runs)
    return [block for blocks, names in made for block in (Heading(3, listed(names)), *blocks)]


def _other_data(study: Study) -> Iterator[Block]:
    """Which curves and figures say nothing of each other."""
    count = len(facts.corpora(run for arm in study.arms for run in arm.runs))
    if count > 1:
        yield Paragraph(
            f"The runs were trained on {count} different corpora and, while they trained, measured on what "
            "each of these holds out: such figures of different corpora say nothing of each other."
        )


def _results(study: Study) -> Table:
    runs = study.runs
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
    for run, verdict in zip(runs, study.verdicts, strict=True):
        rate = facts.rate(run)
        rows.append(
            [
                f"{run.name} (verification failed)" if failed(verdict) else run.name,
                str(facts.seed(run)),
                f"{run.last_step:,}",
                decimal(facts.final(run, "loss (train)")),
                *(decimal(facts.final(run, name)) for name in names),
                "—" if rate is None else f"{rate:,.0f} {run.unit}s",
            ]
        )
    return Table(head, rows)


def _protocol(run: Run) -> list[Block]:
    table = facts.settings(run.config_text, str(run.root))
    points = {name: len(run.evaluation(name)) for name in run.evaluation_names}
    if not points:
        return [Paragraph("No evaluation was recorded.")]
    counts = {} if run.newest is None else run.newest["data"].get("counts", {})
    held_out = ", ".join(
        f"{value:,} {name.removeprefix('held_out_')}"
        for name, value in counts.items()
        if name.startswith("held_out")
    )
    rows = [
        ["measures", ", ".join(points)],
        ["evaluations", ", ".join(dict.fromkeys(f"{count}" for count in points.values()))],
        ["every", f"{table.get('evaluate.every') or 'the end only'}"],
        [
            "batches",
            f"at most {table.get('evaluate.batches', '—')}, of a micro-batch each (train.micro_batch "
            f"{table.get('train.micro_batch', '—')}), the same each time",
        ],
        ["held out", held_out or "not recorded"],
        ["decoding", "nothing is generated while training: the measures are of given samples"],
    ]
    return [Table(["what", "value"], rows)]


_ASIDE = {
    "nonfinite": "the state before a loss or gradients that were not finite",
    "damaged": "set aside; nothing of it counts",
}


def _launches(run: Run) -> list[Block]:
    found = facts.segments(run)
    if not found:
        return [Paragraph("No checkpoint with a readable statement.")]
    head = ["launch", "class", "resumed from", "checkpoints", "processes", "launcher", "precision"]
    rows = [
        [
            str(one.number),
            one.kind,
            "—" if one.resumed_from is None else f"{one.resumed_from:,}",
            f"{one.first:,}" if one.first == one.last else f"{one.first:,} … {one.last:,}",
            str(one.launch.get("world_size", "—")),
            str(one.launch.get("launcher", "—")),
            str(one.launch.get("precision", "—")),
        ]
        for one in found
    ]
    remarks = [f"launch {one.number} differs: {text}" for one in found for text in one.differences]
    remarks += [f"launch {one.number} accepted: {text}" for one in found for text in one.accepted]
    remarks += [f"launch {one.number} skipped {text}" for one in found for text in one.skipped]
    remarks += [f"`{one.name}`: {_ASIDE[one.kind]}" for one in run.checkpoints if one.kind in _ASIDE]
    remarks += [f"`{one.name}`: {one.problem}" for one in run.checkpoints if one.problem]
    if run.superseded:
        remarks.append(
            f"{counted(run.superseded, 'step')} ran again after a resume; their first lines are in events/"
        )
    return [Table(head, rows), *([Bullets(remarks)] if remarks else [])]


def _kernels(run: Run) -> list[Block]:
    try:
        ledger = facts.newest_ledger(run)
    except VerificationFailed as error:
        return [Status("bad", facts.problem(error))]
    if ledger is None:
        return [Paragraph("No checkpoint holds a ledger.")]
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
        looked = ledger.observed_anything
        blocks.append(Paragraph("None was seen, as far as was looked:" if looked else "Nobody has looked:"))
    cost = [] if ledger.budget is None else [f"looking: {ledger.budget.words}", ledger.budget.reason]
    blocks.append(Bullets([*not_looked_at(ledger), *(each for each in cost if each is not None)]))
    return blocks


def _incidents(run: Run) -> list[Block]:
    notes = facts.missing_steps(run)
    if not run.lines_signed:
        whole = any(one.kind in ("complete", "pruned") for one in run.checkpoints)
        why = "determinism.step_digests was off" if whole else "the run has none"
        notes.append(f"{layout.METRICS} is signed by no checkpoint: {why}")
    if run.unsigned:
        notes.append(
            f"{counted(run.unsigned, 'line')} of metrics.jsonl after step {run.last_step:,}: signed by no "
            "checkpoint yet, and left out"
        )
    if run.unreadable:
        notes.append(f"{counted(run.unreadable, 'line')} of metrics.jsonl cannot be read")
    if run.partial:
        notes.append("metrics.jsonl ends inside a line: it is being written, or its writer was cut off")
    shown = run.incidents[-_INCIDENTS:]
    blocks: list[Block] = [Bullets(notes)] if notes else []
    if shown:
        rows = [[_clock(one.time), str(one.rank), one.level, one.event, one.text] for one in shown]
        blocks.append(Table(["time (UTC)", "rank", "level", "event", "what"], rows))
    if len(run.incidents) > len(shown):
        blocks.append(Paragraph(f"The last {len(shown)} of {len(run.incidents)}; all are in events/."))
    return blocks or [Paragraph("None.")]


def _variations(study: Study, run: Run) -> list[Block]:
    tiers = next(each for one, each in zip(study.runs, study.tiers, strict=True) if one is run)
    kind: Literal["good", "bad", "open"] = "bad" if tiers.contradicted else "good" if tiers.told else "open"
    (_, verdict), *rest = tier_lines(tiers)
    told = [f"{label} {text}" if label else text.removeprefix("- ") for label, text in rest]
    return [
        Status(kind, f"repeatability: {verdict}"),
        *([Bullets(told)] if told else []),
        Heading(4, "Reasons"),
        Bullets(facts.could_vary(run, tiers)),
    ]


def _environment(run: Run) -> list[Block]:
    facts = run.newest
    if facts is None:
        return [Paragraph("Not known: no checkpoint has a readable statement.")]
    return [Table(["what", "value"], [[name, value] for name, value in _environment_rows(facts)])]


def _environment_rows(facts: Facts) -> Iterator[tuple[str, str]]:
    code, read = facts["code"], facts["data"]
    state = {True: " with uncommitted changes", False: "", None: " (state unknown)"}[code.get("dirty")]
    yield "harness", str(code.get("harness"))
    commit = code.get("git_commit")
    yield "code", f"`{str(commit)[:12]}`{state}" if commit else f"not a git checkout{state}"
    yield "data", f"{read.get('kind')}, corpus `{str(read.get('corpus_sha256'))[:16]}`"
    for name, value in facts["environment"].items():
        if isinstance(value, str | int | bool):
            yield name.replace("_", " "), str(value)
    found = facts["environment"].get("packages")
    packages = found if isinstance(found, dict) else {}
    for name in ("torch", "accelerate", "numpy", "safetensors"):
        if name in packages:
            yield name, str(packages[name])


_OWN = ("run.dir", "run.name", "run.seed")
"""Settings that a run has for itself."""


def _configs(runs: Sequence[Run]) -> Iterator[Block]:
    """Each config once, whole: what runs of it have for themselves is in the title."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        table = facts.settings(run.config_text, str(run.root))
        shared = {key: value for key, value in table.items() if key not in _OWN}
        groups.setdefault(json.dumps(shared, default=str) if table else run.config_text, []).append(run)
    for first, *others in groups.values():
        title = f"{first.name}: run.yaml"
        if others:
            more = listed([run.name for run in others])
            title += f"; {more}: the same but for {', '.join(_OWN)}"
        yield Source(title, first.config_text or "(missing)")


def _clock(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S") if seconds else "—"
