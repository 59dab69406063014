"""What a verification found: the verdict on a folder, what it rests on, and the same as JSON."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from harness.audit.folders import exported, prepared
from harness.audit.folders.opening import OpenedCheckpoint
from harness.audit.run.stamps import Stamped
from harness.audit.tiers import evidence as tier_evidence
from harness.audit.tiers import rules as tier_rules
from harness.audit.tiers import text
from harness.audit.tiers.rules import Evidence, Tiers
from harness.audit.verification import report_schema
from harness.format import layout
from harness.provenance.findings import Finding, Findings

Kind = Literal["run", "checkpoint", "export", "corpus"]

_VERDICTS = {0: "verified", 1: "FAILED", 4: "cannot tell"}


@dataclass(frozen=True)
class Report:
    """The verdict on a folder, with everything that it rests on."""

    target: Path
    kind: Kind
    findings: tuple[Finding, ...]
    passed: Mapping[str, int]
    """Check → how often it passed."""
    notes: tuple[str, ...]
    """What the reader should know and is no failure; what was not checked, too."""
    checkpoints: tuple[OpenedCheckpoint, ...]
    """Those whose story is authentic, in the order of their commits."""
    bytes_hashed: int
    seconds: float
    exit_code: int
    evidence: Evidence
    """What says how far a rerun would repeat it."""
    since: Mapping[str, Any] | None = None
    """What an earlier verification covered, so that it was not hashed again."""
    stamped: Sequence[Stamped] = ()
    """The timestamps of the log that are good under the policy."""
    shown: Mapping[str, str] = field(default_factory=dict)
    """Hex sha256 of a bundle → the earliest moment at which a kept or timestamped head shows it there."""

    @property
    def tiers(self) -> Tiers:
        """How far a rerun would repeat it, as far as the evidence reaches."""
        return tier_rules.compute(self.evidence)

    @property
    def verdict(self) -> str:
        """``verified``, ``FAILED`` or ``cannot tell``."""
        return _VERDICTS[self.exit_code]

    def document(self) -> dict[str, Any]:
        """The report as plain JSON, as `harness.audit.verification.report_schema` describes it."""
        return {
            "format": report_schema.FORMAT,
            "verdict": self.verdict,
            "path": str(self.target),
            "kind": self.kind,
            "findings": [
                {
                    "check": each.check,
                    "kind": "missing" if each.missing else "wrong",
                    "what": each.what,
                    "where": each.where,
                    "remedy": each.remedy,
                }
                for each in self.findings
            ],
            "checks": dict(self.passed),
            "notes": list(self.notes),
            "checkpoints": [_summary(each, self.shown) for each in self.checkpoints],
            "timestamps": [each.document() for each in self.stamped],
            "repeatability": text.document(self.tiers),
            "since": self.since,
            "bytes_hashed": self.bytes_hashed,
            "seconds": round(self.seconds, 3),
        }


def kind_of(path: Path) -> Kind:
    """What ``path`` is. Raises `UsageError` when it is none of these."""
    if exported.is_export(path):
        return "export"
    return "corpus" if prepared.is_corpus(path) else layout.kind_of(path)


def of(
    target: Path,
    kind: Kind,
    findings: Findings,
    opened: Sequence[OpenedCheckpoint],
    hashed: int,
    started: float,
) -> Report:
    """The report on ``target``, whose verification began at ``started`` (`time.perf_counter`)."""
    ordered = sorted(opened, key=lambda each: (each.statement.sequence, each.statement.step_to))
    return Report(
        target,
        kind,
        tuple(findings.ordered),
        Counter(findings.passed),
        tuple(findings.notes),
        tuple(ordered),
        hashed,
        time.perf_counter() - started,
        findings.exit_code,
        _evidence(kind, findings, ordered),
    )


def _evidence(kind: str, findings: Findings, opened: Sequence[OpenedCheckpoint]) -> Evidence:
    """Nothing counts beside a failure; an export carries no evidence of its own."""
    if findings.failed:
        return Evidence(nothing=f"the verification ended with: {_VERDICTS[findings.exit_code]}")
    if kind == "corpus":
        return Evidence(nothing="a run: a corpus has nothing to replay")
    if kind == "export":
        return Evidence(nothing="an export carries no replays: verify the run that it names")
    return tier_evidence.of_checkpoints(opened)


def _summary(opened: OpenedCheckpoint, shown: Mapping[str, str]) -> dict[str, Any]:
    statement = opened.statement
    return {
        "name": os.path.basename(opened.folder),
        "kind": opened.kind,
        "checkpoint": opened.checkpoint_id,
        "run": statement.run_id,
        "sequence": statement.sequence,
        "steps": {"from": statement.step_from, "to": statement.step_to},
        "policy": statement.policy,
        "signers": list(opened.signers),
        "key_id": opened.signer,
        "bytes": opened.size,
        "shown_at": shown.get(opened.bundle_sha256),
    }
