"""Everything that a report is about: runs, what verification said of them, arms, claims, and the plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from harness.audit.tiers import rules as tier_rules
from harness.audit.tiers.rules import Evidence, Tiers
from harness.provenance.corpora import CorpusStatement
from harness.report import judge, measured
from harness.report.arms import Arm, group
from harness.report.claim_file import Claims
from harness.report.document import Status
from harness.report.judge import Judged
from harness.report.measured import Measure
from harness.report.runs import Evaluated, Run
from harness.sweeps.register import Plan


@dataclass(frozen=True)
class Study:
    """What `harness.report.report.compose` writes about."""

    runs: tuple[Run, ...]
    verdicts: tuple[Status | None, ...]
    """What a verification said of each run; None when there was none."""
    arms: tuple[Arm, ...]
    """Of the runs whose verification, if there was one, has not failed: what was changed is no sample."""
    measures: tuple[Measure, ...]
    """What the arms are compared by."""
    claims: Claims | None
    judged: tuple[Judged, ...]
    plans: tuple[Plan, ...]
    """Of the sweeps among the runs; empty when there is none."""
    absent: tuple[str, ...]
    """Planned members that never began."""
    unplanned: tuple[str, ...]
    """Folders of the runs that belong to no sweep."""
    tiers: tuple[Tiers, ...]
    """How far a rerun of each run would repeat it."""
    corpora: tuple[CorpusStatement, ...]
    """Authentic statements of corpora that runs were trained on."""

    @property
    def planned(self) -> bool:
        """Whether every run is a member of a sweep, whose register names all that there are."""
        return bool(self.plans) and not self.unplanned

    @property
    def several(self) -> bool:
        """Whether runs must be told apart."""
        return len(self.runs) > 1

    @property
    def evaluations(self) -> list[tuple[Run, Evaluated]]:
        """Test-results that a verification accepted, each with its run."""
        return [(run, each) for run in self.runs for each in run.evaluated]


def failed(verdict: Status | None) -> bool:
    """Whether a verification found a run to be bad."""
    return verdict is not None and verdict.kind == "bad"


def study(
    runs: Sequence[Run],
    verdicts: Sequence[Status | None],
    claims: Claims | None = None,
    plans: Sequence[Plan] = (),
    absent: Sequence[str] = (),
    unplanned: Sequence[str] = (),
    evidence: Sequence[Evidence] = (),
    corpora: Sequence[CorpusStatement] = (),
) -> Study:
    """Group the runs into arms and hold the claims against them; ``evidence`` of each run comes from its
    verification, and without one nothing counts.

    Raises `EnvironmentFault` when statistics are needed and scipy is not there.
    """
    judged = [] if claims is None else judge.judge(claims.claims, runs, verdicts, absent)
    known = evidence or [Evidence(nothing=tier_rules.NOT_SIGNED)] * len(runs)
    tiers = [
        tier_rules.compute(replace(each, claims=tuple(judge.supporting(judged, run, runs))))
        for each, run in zip(known, runs, strict=True)
    ]
    return Study(
        tuple(runs),
        tuple(verdicts),
        tuple(group([run for run, verdict in zip(runs, verdicts, strict=True) if not failed(verdict)])),
        tuple(measured.measures(runs)),
        claims,
        tuple(judged),
        tuple(plans),
        tuple(absent),
        tuple(unplanned),
        tuple(tiers),
        tuple(corpora),
    )
