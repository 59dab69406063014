"""Runs that other runs began with: read from the folders that a person names with ``--with``.

A child names the checkpoint that it began with in every statement, so it verifies without its parent. With
the parent at hand the edge itself is checked: the checkpoint is there, is authentic, belongs to the run and
the step that the child names, and carries the very statement that the child saw. The parent's payload, log
and metrics are the business of `harness verify PARENT`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from harness.audit.folders import opening
from harness.audit.folders.opening import OpenedCheckpoint
from harness.audit.run import handover, seen
from harness.format import layout
from harness.format.layout import RunFolder
from harness.provenance import history
from harness.provenance.findings import Findings
from harness.provenance.history import Entry
from harness.provenance.policy import rotation
from harness.provenance.policy.rules import Policy


def folders(path: Path) -> list[Path]:
    """The checkpoints that ``path``, a run folder or one of them, can give as a start.

    Raises `UsageError` when it is neither.
    """
    if layout.kind_of(path) == "checkpoint":
        return [path]
    run = RunFolder(path)
    return [*run.complete(), *run.pruned()]


def check(entries: Sequence[Entry], paths: Sequence[Path], policy: Policy, findings: Findings) -> None:
    """What the run of ``entries`` began with, and what that run began with, as far as ``paths`` reach.

    Raises as `read`.
    """
    history.check_starts(entries, read(paths, policy, findings), findings, wanted=bool(paths))
    if paths:
        named = ", ".join(f"harness verify {path}" for path in paths)
        findings.note(f"of the runs given by --with: payload, log and metrics not checked ({named})")


def read(paths: Sequence[Path], policy: Policy, findings: Findings) -> list[Entry]:
    """The authentic checkpoints in ``paths``; what is wrong with one is a finding.

    Raises `UsageError` for a path that is neither run nor checkpoint, `EnvironmentFault` for a bad disk.
    """
    found: list[Entry] = []
    for path in paths:
        shown = seen.beside(path, policy)
        told = findings.attempt(rotation.CHECK, handover.trust, path, policy, shown)
        whom = policy if told is None else told.policy
        opened = [opening.examine_folder(folder, whom, findings, shown.bundles) for folder in folders(path)]
        entries = history.in_order([entry_of(each) for each in opened if each is not None])
        if layout.kind_of(path) == "run":
            history.check_lineage(entries, findings)
        found += entries
    return found


def entry_of(opened: OpenedCheckpoint) -> Entry:
    """``opened`` as the rules between checkpoints see it."""
    where, identity = str(opened.folder), opened.checkpoint_id
    return Entry(where, opened.statement, identity, opened.bundle_sha256, opened.later, opened.signer)
