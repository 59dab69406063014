"""Under which policy a run says that it was made, told beside the one that it is verified with.

The run's own is a claim of whoever signed it: an auditor compares it with theirs, and judges by theirs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from harness.format import layout
from harness.provenance.findings import Findings
from harness.provenance.history import Entry
from harness.provenance.policy import canonical
from harness.provenance.policy.rules import Policy


def note(entries: Sequence[Entry], given: Policy, copy: bytes | None, findings: Findings) -> None:
    """Under which policy the newest of ``entries`` was made; nothing depends on it.

    ``given``: what the run is verified with; ``copy``: policy.json, if it is what the statement names.
    """
    named = entries[-1].statement.policy if entries else None
    if named is not None:
        findings.note(_told(named, given, copy))


def _told(named: Mapping[str, Any], given: Policy, copy: bytes | None) -> str:
    name = f"{named['name']}, sha256 {named['sha256']}"
    if given.is_of_keys:
        where = "" if copy is None else f" ({layout.POLICY} holds it, to be read, not to be trusted)"
        return f"made under the policy {name}{where}"
    own = canonical.written(given)
    if canonical.digest(own) == named["sha256"]:
        return f"made under the policy that is given: {name}"
    rules = [] if copy is None else canonical.changed(copy, own)
    differ = f"; they differ in {', '.join(rules)}" if rules else ""
    return f"made under another policy than the one that is given: {name}{differ}"
