"""What is signed of each run: its newest checkpoint, and the policy that it names."""

from __future__ import annotations

from collections.abc import Iterator

from harness.errors import visible
from harness.report.document import Block, Bullets, Paragraph, Status, Table
from harness.report.runs import Run
from harness.report.study import Study, failed


def blocks(study: Study) -> Iterator[Block]:
    """The section of the report."""
    rows = [
        row for run, verdict in zip(study.runs, study.verdicts, strict=True) for row in _signed(run, verdict)
    ]
    if rows:
        yield Table(["run", "checkpoint", "kind", "state", "created", "signed by"], rows)
        yield Paragraph(
            "The newest checkpoint of each run, or the state that was kept when it became non-finite before "
            "the first; `harness lineage` shows all of them."
        )
    else:
        yield Paragraph("No checkpoint with a readable statement.")
    if policies := _policies(study):
        yield Paragraph(
            "Made under a policy, as its runs say; `harness verify --policy` compares it with yours."
        )
        yield Bullets(policies)


def _policies(study: Study) -> list[str]:
    """Each policy that a newest checkpoint names, with the runs that do."""
    found: dict[tuple[str, str], list[str]] = {}
    for run in study.runs:
        named = None if run.newest is None else run.newest.get("policy")
        if named is not None:
            found.setdefault((named["name"], named["sha256"]), []).append(run.name)
    return [
        f"{visible(name)}, sha256 `{sha256}`: {', '.join(runs)}" for (name, sha256), runs in found.items()
    ]


def _signed(run: Run, verdict: Status | None) -> Iterator[list[str]]:
    for one in run.checkpoints:
        if one.facts is not None and one.facts is run.newest:
            state, created = str(one.facts["state"]["sha256"]), str(one.facts["created"])
            who = "verification failed" if failed(verdict) else one.signer or "not verified"
            yield [run.name, f"`{one.name}`", one.kind, f"`{state[:16]}`", created, who]
