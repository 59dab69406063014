"""Under which policy a run says that it was made, told beside the one that it is verified with.

The run's own is a claim of whoever signed it: an auditor compares it with theirs, and judges by theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.format import layout
from harness.provenance.policy import canonical
from harness.provenance.policy.rules import Policy


def told(named: Mapping[str, Any], given: Policy, copy: bytes | None) -> str:
    """``named``: as a statement does it; ``given``: what the run is verified with; ``copy``: policy.json, if
    it is what the statement names."""
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
