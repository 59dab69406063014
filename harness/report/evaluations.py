"""Evaluations that were signed into checkpoints after they were made: measures, decoding, and who says so.

Only statements that a verification has accepted are shown; a run whose verification failed has none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from harness.report.argument import decimal
from harness.report.document import Block, Heading, Paragraph, Table
from harness.report.runs import Evaluated, Run
from harness.report.study import Study


def blocks(study: Study) -> Iterator[Block]:
    """The section of a report: a table for each question that was asked."""
    yield Heading(2, "Evaluations of checkpoints")
    if not study.evaluations:
        told = (
            "No verified checkpoint has a signed test-result; `harness evaluate` adds one."
            if any(study.verdicts)
            else "Signed test-results are shown once they are verified: give `--key` or `--policy`."
        )
        yield Paragraph(told)
    questions: dict[tuple[str, str], list[tuple[Run, Evaluated]]] = {}
    for run, one in study.evaluations:
        questions.setdefault(_question(one), []).append((run, one))
    for (name, how), answers in questions.items():
        yield Heading(3, name)
        yield Paragraph(how)
        measures = list(dict.fromkeys(measure for _, one in answers for measure in one.metrics))
        head = ["run", "checkpoint", *measures, "result", "signed by", "statement", "sha256"]
        yield Table(head, [_row(*each, measures) for each in answers])


def _question(one: Evaluated) -> tuple[str, str]:
    """What was asked, as a title and a sentence."""
    told: Mapping[str, Any] = one.facts.get("harness_evaluation") or {}
    procedure = str(told.get("procedure", {}).get("name", "procedure not recorded"))
    data, examples = told.get("dataset"), told.get("examples")
    suite = "suite not recorded" if data is None else f"{data['name']}, {data['split']}"
    decoding = ", ".join(
        f"{name.replace('_', ' ')} {value}" for name, value in told.get("decoding", {}).items()
    )
    counted = "an unknown number of examples" if examples is None else f"{examples:,} examples"
    digest = f" of `{data['sha256'][:16]}`" if data is not None and data["sha256"] else ""
    how = f"decoding: {decoding}" if decoding else "nothing is generated"
    return f"{procedure}: {suite}", f"{counted[0].upper()}{counted[1:]}{digest}; {how}."


def _row(run: Run, one: Evaluated, measures: Sequence[str]) -> list[str]:
    return [
        run.name,
        f"`{one.checkpoint}`",
        *(decimal(one.metrics.get(name)) for name in measures),
        str(one.facts["result"]) + (f": {', '.join(one.failed)}" if one.failed else ""),
        one.signer,
        one.statement,
        f"`{one.sha256[:12]}`",
    ]
