"""One folder by itself: a checkpoint, an export or a prepared corpus, without the run that it belongs to.

A checkpoint is opened (`harness.audit.folders.opening`), then every byte of its payload is hashed
(`harness.audit.folders.payload`). What asks for a log cannot be answered here, and is told as missing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from harness.audit.folders import exported, opening, payload, prepared
from harness.audit.run import handover, made_under, seen, undisturbed
from harness.audit.verification import ancestors, report
from harness.audit.verification.ancestors import entry_of
from harness.audit.verification.report import Kind, Report
from harness.format import files
from harness.provenance import freshness
from harness.provenance.findings import Findings
from harness.provenance.policy import rules as policies
from harness.provenance.policy.rules import Policy
from harness.provenance.transparency import heads


def verify_checkpoint(
    folder: Path, policy: Policy, *, beside: Sequence[Path] = (), quiet: bool = False
) -> Report:
    """Check one checkpoint by itself. Raises `EnvironmentFault` for a disk that cannot be read,
    `EvidenceIncomplete` for one that is removed meanwhile."""
    check = partial(_verify_checkpoint, folder, policy, beside, quiet)
    return undisturbed.read(folder, check, lambda made: made.findings)


def _verify_checkpoint(folder: Path, policy: Policy, beside: Sequence[Path], quiet: bool) -> Report:
    started = time.perf_counter()
    findings, given = Findings(), policy
    shown = seen.beside(folder, policy)
    policy = handover.examine(folder, policy, shown, findings).policy
    opened = opening.examine_folder(folder, policy, findings, shown.bundles)
    hashed = 0 if opened is None else payload.check(opened.jobs, findings, quiet=quiet)
    if opened is not None and opened.kind == "pruned":
        findings.missing("payload", opening.pruned(folder).what, str(folder), "choose a newer checkpoint")
    if opened is not None and opened.kind == "nonfinite":
        findings.note("the last state of a run that became non-finite: authentic, and no good checkpoint")
    entries = [] if opened is None else [entry_of(opened)]
    ancestors.check(entries, beside, policy, findings)
    made_under.note(entries, given, None, findings)
    _miss_log(policy, findings, "a checkpoint folder", folder)
    freshness.check(policy, [each.statement.created for each in entries], findings, str(folder))
    findings.note("lineage and log: not checked (they belong to the run folder)")
    made = report.of(folder, "checkpoint", findings, [] if opened is None else [opened], hashed, started)
    return replace(made, shown=shown.bundles)


def verify_export(folder: Path, policy: Policy, *, quiet: bool = False) -> Report:
    """Check a folder that `harness export` has written. Raises `EnvironmentFault` for a bad disk."""
    return _verify_sealed("export", folder, policy, exported.examine, quiet)


def verify_corpus(folder: Path, policy: Policy, *, quiet: bool = False) -> Report:
    """Check a folder that `harness prepare` has made. Raises `EnvironmentFault` for a bad disk."""
    return _verify_sealed("corpus", folder, policy, lambda *words: prepared.examine(*words)[1:], quiet)


def _verify_sealed(
    kind: Kind,
    folder: Path,
    policy: Policy,
    examine: Callable[[Path, Policy, Findings], tuple[list[payload.Job], list[str]]],
    quiet: bool,
) -> Report:
    """A folder with one statement and a manifest of everything else."""
    started = time.perf_counter()
    findings = Findings()
    try:
        work, times = examine(folder, policy, findings)
        hashed = payload.check(work, findings, quiet=quiet)
    except OSError as error:
        raise files.unreadable(error, str(error.filename or folder)) from error
    if kind == "export":
        _miss_log(policy, findings, "an exported folder", folder)
    else:
        findings.note("log: not asked for (a corpus has none)")
    freshness.check(policy, times, findings, str(folder))
    return report.of(folder, kind, findings, [], hashed, started)


def _miss_log(policy: Policy, findings: Findings, kind: str, folder: Path) -> None:
    """What asks for a log cannot be answered without one."""
    remedy = "verify the run folder"
    for wanted, told in ((policies.LOG, "the log"), (policies.TIMESTAMP, "timestamps")):
        if wanted in policy.required:
            what = f"the policy requires {told}, and {kind} alone has none"
            findings.missing("required", what, str(folder), remedy)
    for each in policy.log_heads:
        what = f"{each.source} is to be continued by a log, and {kind} alone has none"
        findings.missing(heads.CHECK, what, str(folder), remedy)
