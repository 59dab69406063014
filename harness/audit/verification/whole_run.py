"""A run as a whole: every checkpoint, the lineage and the log between them (`harness.provenance.history`),
the metrics chain (`harness.audit.run.chain`), run.yaml and policy.json.

Nothing stops at the first failure; all of them are reported, in the order of `harness.provenance.checks`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from harness.audit.folders import payload
from harness.audit.folders.opening import OpenedCheckpoint
from harness.audit.run import handover, log_folder, made_under, own_files, seen, stamps, undisturbed
from harness.audit.verification import ancestors, incremental, many, report
from harness.audit.verification.ancestors import entry_of
from harness.audit.verification.report import Report
from harness.errors import EvidenceIncomplete, VerificationFailed, visible
from harness.format import files, layout
from harness.format.layout import RunFolder
from harness.provenance import freshness, history
from harness.provenance.findings import Findings
from harness.provenance.history import Entry
from harness.provenance.policy import rotation
from harness.provenance.policy import rules as policies
from harness.provenance.policy.rules import Policy, Rotation
from harness.provenance.transparency import heads, log
from harness.provenance.transparency.heads import Kept
from harness.words import listed

_SIGNED = {layout.CHECKPOINTS, layout.LOG, layout.METRICS, layout.RUN_CONFIG, layout.POLICY}
"""What signatures cover in a run folder."""
_NAMED = 20
"""Names of files that no signature covers, in a note."""


def verify_run(
    root: Path,
    policy: Policy,
    *,
    beside: Sequence[Path] = (),
    since: Kept | None = None,
    keep: own_files.Kept | None = None,
    quiet: bool = False,
) -> Report:
    """Check a whole run, which a job may go on with meanwhile (`harness.audit.run.undisturbed`).

    ``since``: one of ``policy.log_heads``; payload of checkpoints that it covers is not hashed.
    ``keep`` gets what is read of metrics.jsonl and run.yaml.

    Raises `EnvironmentFault` for a disk that cannot be read, `EvidenceIncomplete` as `undisturbed.read`.
    """

    def attempt() -> Report:
        if keep is not None:
            keep.lines.clear()
            keep.config = None
        return _verify_run(root, policy, beside=beside, since=since, keep=keep, quiet=quiet)

    return undisturbed.read(root, attempt, lambda made: made.findings)


@many.without_collections()
def _verify_run(
    root: Path,
    policy: Policy,
    *,
    beside: Sequence[Path],
    since: Kept | None,
    keep: own_files.Kept | None,
    quiet: bool,
) -> Report:
    started = time.perf_counter()
    findings = Findings()
    run, given = RunFolder(root), policy
    try:
        shown = seen.look(run.log, policy, findings)
        trust = handover.examine(root, policy, shown, findings)
        policy = trust.policy
        if policy.witnesses and not policy.log_heads:
            what = "the policy wants a head that witnesses have cosigned, and none is kept"
            findings.missing(heads.CHECK, what, str(root), "give it: --head FILE, or log_head in the policy")
        findings.all_of("file set", _links(run))
        claimed = shown.book or _claimed(run)
        folders = folders_of(run, findings)  # after the log: what a job adds meanwhile is not in it yet
        earlier = incremental.known(claimed, since)
        opened = many.examine(folders, policy, findings, shown.bundles, earlier, quiet=quiet)
        known = [each for each in opened if each is not None]
        entries = history.in_order([entry_of(each) for each in known if each.kind != "nonfinite"])
        # Which payload is hashed depends on the log; its findings come after those of the payload.
        later = Findings()
        entitled = partial(_entitled, entries=entries, rotations=trust.rotations)
        unlogged = _ended_unlogged(run, opened, policy)
        if unlogged:
            later.note("log: none, since the run ended before its first checkpoint")
        told_of = [entry_of(each) for each in known] if unlogged else entries
        # Each launch of such a run began it anew, and with it the files beside its states.
        latest = [max(told_of, key=lambda each: each.statement.created)] if unlogged else entries
        whole = policy.as_of(shown.whole)
        book = None if unlogged else _read_log(run, claimed, entitled(whole), later)
        if book is None and _is_told(run, whole, entries, findings):
            later = Findings(notes=["log: not checked (what is wrong with its signer is said already)"])
        if book is not None and shown.book is not None and book.head != shown.book.head:
            # It has grown since, and nothing is shown of when this head was signed.
            book = _read_log(run, book, entitled(policy), later)
        continued = book is not None and heads.check(book, policy.log_heads, later, str(run.log))
        covered = incremental.covered(known, book, since) if continued else []
        told = {id(each) for each in covered}
        work = [job for each in known if id(each) not in told for job in each.jobs]
        hashed = payload.check(work, findings, quiet=quiet)
        if since is not None:
            findings.note(incremental.told(since, covered, continued))
        _check_newest(known, findings)
        history.check_lineage(entries, findings)
        findings.extend(later)
        _check_log(run, known, entries, book, trust.rotations, findings)
        if book is not None:
            stamps.require(book, shown.stamped, policy, findings, str(run.log))
        ancestors.check(told_of, beside, policy, findings)
        own_files.check_metrics(run, latest, findings, None if keep is None else keep.lines.append)
        config = own_files.check_config(run, latest, findings)
        if keep is not None:
            keep.config = config
        copy = own_files.check_policy(run, latest, findings)
        made_under.note(latest, given, copy, findings)
        times = [each.statement.created for each in told_of]
        freshness.check(policy, [*times, *shown.kept], findings, str(root))
    except OSError as error:
        raise files.unreadable(error, str(error.filename or root)) from error
    if not opened:
        findings.missing("checkpoints", "the run holds no checkpoint", str(root))
    _tell_unsigned(root, findings)
    made = report.of(root, "run", findings, known, hashed, started)
    return replace(
        made,
        since=incremental.document(since, covered, continued),
        stamped=tuple(shown.stamped),
        shown=shown.bundles,
    )


def folders_of(run: RunFolder, findings: Findings) -> list[Path]:
    """What to check under ``checkpoints/``; what is set aside is named."""
    folders = [*run.complete(), *run.pruned()]
    for path in run.aside():
        if path.name.startswith(layout.NONFINITE):
            folders.append(path)
        elif path.name.startswith(layout.DAMAGED):
            findings.note(f"not checked: {path.name} (set aside as damaged by a resume)")
        elif path.name.startswith(layout.TEMPORARY):
            findings.note(f"not checked: {path.name} (a save or a fetch that was cut off)")
        else:
            findings.bad("file set", "is no checkpoint's name", str(path), "move it out of the run folder")
    return folders


def _links(run: RunFolder) -> Iterator[tuple[str, str]]:
    """Folders of ``run`` that are elsewhere: what is there can be exchanged behind the run's back."""
    for path in (run.checkpoints, run.log):
        if path.is_symlink():
            yield "is a symbolic link", str(path)


def _tell_unsigned(root: Path, findings: Findings) -> None:
    """What lies in a run folder for convenience, or to be taken for a part of the run."""
    names = sorted(set(os.listdir(root)) - _SIGNED)
    if names:
        findings.note(f"covered by no signature: {listed(names, _NAMED)}")


def _check_newest(opened: Sequence[OpenedCheckpoint], findings: Findings) -> None:
    """``checkpoint.keep`` never removes the newest payload, so without it there is nothing left to check."""
    commits = [each for each in opened if each.kind != "nonfinite"]
    newest = max(commits, key=lambda each: each.statement.sequence, default=None)
    if newest is not None and newest.kind == "pruned":
        what = "the newest checkpoint has no payload, and checkpoint.keep always leaves it one"
        findings.missing("payload", what, str(newest.folder), "get the whole folder from its maker")


def _check_log(
    run: RunFolder,
    opened: Sequence[OpenedCheckpoint],
    entries: Sequence[Entry],
    book: log.Log | None,
    rotations: Sequence[Rotation],
    findings: Findings,
) -> None:
    """The log against the run's commits, and against what was set aside as non-finite."""
    aside = [entry_of(each) for each in opened if each.kind == "nonfinite"]
    if book is not None:
        history.check_log(entries, book, findings, str(run.log), aside, rotations)
        log_folder.check(run.log, book, findings)
        findings.note(f"log head: {book.head.size} records, root {book.head.root.hex()}")
    for each in aside:
        history.check_set_aside(each, entries, book, findings)


def _entitled(policy: Policy, entries: Sequence[Entry], rotations: Sequence[Rotation]) -> Policy:
    """Whoever may sign the head of the log that ends with the newest of ``entries`` or a hand-over."""
    if rotations:
        # The record of a hand-over stands after the checkpoints of the old key, whatever time they state.
        policy = policy.without(rotation.handed_over(rotations)).untimed()
    if not entries:
        return policy
    newest = entries[-1].statement
    return policy.within(newest.run_id, newest.run_name, newest.created, policies.LOG)


def _claimed(run: RunFolder) -> log.Log | None:
    """The run's log as it claims to be; None for one that cannot be read, a finding where it is checked."""
    try:
        return log.read_claimed(run.log)
    except (VerificationFailed, EvidenceIncomplete):
        return None


def _read_log(run: RunFolder, claimed: log.Log | None, signing: Policy, findings: Findings) -> log.Log | None:
    """The run's log under a head that ``signing`` lets somebody sign; None with a finding."""
    return findings.attempt("log", log.read, run.log, signing.statement_keys, claimed)


def _is_told(run: RunFolder, policy: Policy, entries: Sequence[Entry], findings: Findings) -> bool:
    """Whether the log's head does not count for a reason which is a finding of a checkpoint already."""
    path = run.log / log.HEAD
    for key in policy.statement_keys if entries else ():
        try:
            log.open_note(files.read_limited(path, log.NOTE_LIMIT), [key], where=str(path))
        except (VerificationFailed, EvidenceIncomplete):
            continue
        newest, words = entries[-1].statement, (policies.LOG, policy.proven, key.key_id)
        run_of = (newest.run_id, newest.run_name)
        reason = policy.identity(key).objection(*run_of, newest.created, *words)
        return any(each.check == "policy" and each.what == visible(reason or "") for each in findings.failed)
    return False


def _ended_unlogged(run: RunFolder, opened: Sequence[OpenedCheckpoint | None], policy: Policy) -> bool:
    """Whether the run became non-finite before its first checkpoint, and so before its log, as its last state
    says that has seen none. Not where ``policy`` asks for what only a log can show."""
    asked = policy.log_heads or {policies.LOG, policies.TIMESTAMP} & policy.required
    if asked or not opened or os.path.lexists(run.log):
        return False
    return all(
        each is not None and each.kind == "nonfinite" and each.statement.predicate["log"] is None
        for each in opened
    )
