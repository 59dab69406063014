"""How old the newest evidence is: an old state of a run, shown again, is authentic in every part.

The age is that of the newest checkpoint, by the time that its signer states, or of a kept log head that
holds all of the log's records, since whoever saw that head saw that there was nothing newer. A time that is
still to come is refused: it would stay young for ever.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

from harness.provenance.checks import Check
from harness.provenance.findings import Findings
from harness.provenance.policy.rules import Policy

CHECK: Check = "freshness"
_SKEW = timedelta(minutes=10)
"""How far the signer's clock may be ahead of the verifier's."""


def now() -> datetime:
    """The verifier's clock."""
    return datetime.now(UTC)


def check(policy: Policy, times: Iterable[str], findings: Findings, where: str) -> None:
    """The newest of ``times`` (``2026-11-23T20:00:00Z``) is not older than ``policy`` allows."""
    known = max(times, default=None)
    if policy.max_age is None or known is None:
        return
    age = now() - datetime.fromisoformat(known)
    if age < -_SKEW:
        what = f"states the time {known}, which is still to come"
        findings.bad(CHECK, what, where, "compare the clocks; a time to come would never grow old")
    elif age > policy.max_age:
        what = f"the newest evidence is of {known}, {_told(age)} ago; max_age is {_told(policy.max_age)}"
        findings.bad(CHECK, what, where, "get the newest state of the run from its maker")
    else:
        findings.passed.append(CHECK)


def _told(span: timedelta) -> str:
    days, hours = span.days, span.seconds // 3600
    return f"{days} days" if days > 1 else f"{days * 24 + hours} hours"
