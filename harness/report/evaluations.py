"""Evaluations that were signed into checkpoints after they were made: measures, decoding, and who says so.

Only statements that a verification has accepted are shown; a run whose verification failed has none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from harness.report.argument import decimal
from harness.report.document import Block, Heading, Paragraph, Table
from harness.report.runs import Evaluated, Run
from harness.report.study import Study

_HEAD = (
    "run",
    "checkpoint",
    "measures",
    "examples",
    "procedure",
    "suite",
    "decoding",
    "result",
    "signed by",
    "statement",
)


def blocks(study: Study) -> Iterator[Block]:
    """The section of a report."""
    yield Heading(2, "Evaluations of checkpoints")
    if study.evaluations:
        yield Table(list(_HEAD), [_row(*each) for each in study.evaluations])
    elif any(study.verdicts):
        yield Paragraph("No verified checkpoint has a signed test-result; `harness evaluate` adds one.")
    else:
        yield Paragraph("Signed test-results are shown once they are verified: give `--key` or `--policy`.")


def _row(run: Run, one: Evaluated) -> list[str]:
    told: Mapping[str, Any] = one.facts.get("harness_evaluation") or {}
    measures = (f"{name} {decimal(value)}" for name, value in one.metrics.items())
    decoding = ", ".join(
        f"{name.replace('_', ' ')} {value}" for name, value in told.get("decoding", {}).items()
    )
    examples = told.get("examples")
    return [
        run.name,
        f"`{one.checkpoint}`",
        ", ".join(measures) or "—",
        "—" if examples is None else f"{examples:,}",
        str(told.get("procedure", {}).get("name", "not recorded")),
        _suite(told.get("dataset")),
        decoding or "nothing is generated",
        str(one.facts["result"]) + (f": {', '.join(one.failed)}" if one.failed else ""),
        one.signer,
        f"{one.statement}, `{one.sha256[:12]}`",
    ]


def _suite(data: Mapping[str, Any] | None) -> str:
    if data is None:
        return "not recorded"
    digest = f", `{data['sha256'][:12]}`" if data["sha256"] else ""
    return f"{data['name']}, {data['split']}{digest}"
