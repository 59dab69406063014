"""When things are shown to have been there: by log heads that somebody has kept, and by timestamps.

Both show of a head that all of its records were there at a moment, with whatever these name by digest,
whoever has signed the head. A kept head says more: that its owner saw nothing newer
(`harness.audit.run.stamps`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from harness.audit.run import stamps
from harness.audit.run.stamps import Stamped
from harness.errors import EvidenceIncomplete, VerificationFailed
from harness.format import layout
from harness.provenance import log_record
from harness.provenance.findings import Findings
from harness.provenance.policy.rules import Policy
from harness.provenance.transparency import heads, log


@dataclass(frozen=True)
class Seen:
    """What was there when."""

    moments: Sequence[tuple[int, str]] = ()
    """(size, moment): so many records are shown to have been there then."""
    bundles: Mapping[str, str] = field(default_factory=dict)
    """Hex sha256 of each logged bundle → the earliest moment at which it is shown to be there."""
    whole: str | None = None
    """The earliest moment at which the log is shown to be what it is now."""
    kept: Sequence[str] = ()
    """The moments at which the owners of kept heads saw the log as it is now."""
    stamped: Sequence[Stamped] = ()
    """The good timestamps."""
    book: log.Log | None = None
    """The log that all of this is said of, as it claims to be; None where nothing is said."""

    def earliest(self, number: int) -> str | None:
        """The earliest moment at which the record ``number`` is shown to be there; None: at none."""
        return min((moment for size, moment in self.moments if size > number), default=None)


def look(folder: Path, policy: Policy, findings: Findings) -> Seen:
    """What the log ``folder`` shows under ``policy``; a timestamp that is not good is a finding."""
    there = stamps.sizes(folder)  # before the log: a job may append to it and have it timestamped meanwhile
    if there and not policy.authorities:
        findings.note(f"timestamps: {len(there)} not checked (the policy names no authority)")
        there = []
    if not there and not any(each.seen for each in policy.log_heads):
        return Seen()
    try:
        book = log.read_claimed(folder)
        kept = heads.seen_before(book, policy.log_heads)
        stamped = stamps.check(folder, book, there, policy, findings)
        moments = [*kept, *((each.size, each.moment) for each in stamped)]
        bundles = log_record.first_seen(book, moments)
    except (VerificationFailed, EvidenceIncomplete):
        return Seen()  # a log that cannot be read shows nothing, and is a finding where it is checked
    for size, moment in kept:
        findings.note(f"a kept head shows that the first {size} records were there at {moment}")
    if stamped:
        findings.note(_told(stamped))
    whole = min((moment for size, moment in moments if size == book.head.size), default=None)
    seen_whole = [moment for size, moment in kept if size == book.head.size]
    return Seen(moments, bundles, whole, seen_whole, stamped, book)


def beside(folder: Path, policy: Policy) -> Seen:
    """`look` at the run that ``folder`` is, or lies in as a checkpoint; what is wrong there shows nothing."""
    run = layout.run_of(folder)
    return Seen() if run is None else look(run.log, policy, Findings())


def _told(stamped: Sequence[Stamped]) -> str:
    newest = max(stamped, key=lambda each: each.size)
    more = "" if len(stamped) == 1 else f"; {len(stamped) - 1} more of earlier heads are good"
    what = f"shows that the first {newest.size} records were there at {newest.moment}"
    return f"a timestamp of {newest.authority} {what}{more}"
