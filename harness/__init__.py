"""Distributed training whose checkpoints can prove where they came from."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.audit.verification.report import Report
    from harness.provenance.policy.rules import Policy

__version__ = "0.1.0"


def verify(
    path: str | PathLike[str],
    policy: Policy | str | PathLike[str],
    *,
    head: Sequence[str | PathLike[str]] = (),
    since: str | PathLike[str] | None = None,
) -> Report:
    """Check a run, checkpoint, export or prepared corpus as `harness verify` does, for other programs' gates.

    ``policy``: a policy file, or what `harness.provenance.policy.rules` makes of keys. ``head``, ``since``:
    files of `harness head`, as in `harness verify --head` and ``--since``. A folder that fails is no
    exception: see ``exit_code``, ``verdict``, ``findings`` of the report. Raises `harness.errors.UsageError`
    for a path that is none of these or a policy that cannot be read, `EnvironmentFault` for a bad disk.
    """
    # Here, so that `import harness` costs nothing.
    from harness.audit.verification import verify as audit
    from harness.provenance.policy import reader
    from harness.provenance.policy import rules as policies

    whom = policy if isinstance(policy, policies.Policy) else reader.load(Path(policy))
    kept = None if since is None else Path(since)
    return audit.verify(Path(path), whom, head=[Path(file) for file in head], since=kept, quiet=True)
