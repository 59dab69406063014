"""`harness verify`: everything that a checkpoint folder or a run folder claims, checked from the files alone.

A run: `whole_run`. A checkpoint, an export, a prepared corpus: `one_folder`. With P-256 keys alone:
`model_only`. Nothing stops at the first failure; all of them are reported, in the order of
`harness.provenance.checks`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from harness.audit.run import handover
from harness.audit.verification import model_only, one_folder, report, whole_run
from harness.audit.verification.report import Report
from harness.errors import UsageError, VerificationFailed
from harness.format import files
from harness.provenance.policy.rules import Policy
from harness.provenance.signing.keys import PublicKey
from harness.provenance.transparency import heads


def verify(
    path: Path,
    policy: Policy,
    *,
    beside: Sequence[Path] = (),
    head: Sequence[Path] = (),
    since: Path | None = None,
    quiet: bool = False,
) -> Report:
    """Check a run folder or a checkpoint folder; ``quiet`` hides the progress bar.

    ``beside``: folders of the runs that it and they began with; with any, each start must be among them.
    ``head``: files with log heads that were kept, which the run's log must continue.
    ``since``: such a file, kept after a verification that found nothing. What it covers is not hashed again.

    Raises `UsageError` when ``path`` is neither, or no run and ``since`` is given; `VerificationFailed` or
    `EvidenceIncomplete` for a file of ``head`` or ``since`` that is no signed head; `EnvironmentFault` for a
    disk that cannot be read.
    """
    path = files.real(path) if path.is_symlink() else path  # links are refused inside the folder, not to it
    if policy.is_of_models_only:
        if beside or head or since is not None:
            raise UsageError(
                "no Ed25519 key was given, and heads and lineage are signed with one",
                where=str(path),
                remedy="add --key NAME.ed25519.pub",
            )
        return model_only.verify(path, policy, quiet=quiet)
    keys = _keys(path, policy) if head or since is not None else ()
    load = partial(heads.load, keys=keys, witnesses=policy.witnesses, threshold=policy.witness_threshold)
    earlier = None if since is None else load(since)
    kept = [load(file) for file in head] + ([earlier] if earlier else [])
    policy = replace(policy, log_heads=(*policy.log_heads, *kept))
    kind = report.kind_of(path)
    if kind == "run":
        return whole_run.verify_run(path, policy, beside=beside, since=earlier, quiet=quiet)
    if earlier is not None:
        what = "--since needs a run folder, whose log it looks into"
        raise UsageError(what, where=str(path), remedy="name the run folder, or leave --since out")
    if kind == "export":
        return one_folder.verify_export(path, policy, quiet=quiet)
    if kind == "corpus":
        return one_folder.verify_corpus(path, policy, quiet=quiet)
    return one_folder.verify_checkpoint(path, policy, beside=beside, quiet=quiet)


def _keys(path: Path, policy: Policy) -> Sequence[PublicKey]:
    """Who may have signed a head of the log of ``path``; a hand-over that is wrong is a finding elsewhere."""
    try:
        return handover.trust(path, policy).policy.statement_keys
    except VerificationFailed:
        return policy.statement_keys
