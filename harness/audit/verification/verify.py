"""`harness verify`: everything that a checkpoint folder or a run folder claims, checked from the files alone.

A checkpoint: `harness.audit.folders.opening`, then every payload byte is hashed
(`harness.audit.folders.payload`). A run: every checkpoint, the lineage and the log between them
(`harness.provenance.history`), the metrics chain (`harness.audit.run.chain`), run.yaml and policy.json.
Nothing stops at the first failure; all of them are reported, in the order of `harness.provenance.checks`.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from harness.audit.folders import exported, opening, payload, prepared
from harness.audit.folders.opening import OpenedCheckpoint
from harness.audit.run import handover, log_folder, made_under, own_files, seen, stamps, undisturbed
from harness.audit.run.handover import Trust
from harness.audit.run.seen import Seen
from harness.audit.run.stamps import Stamped
from harness.audit.tiers import evidence as tier_evidence
from harness.audit.tiers import rules as tier_rules
from harness.audit.tiers import text
from harness.audit.tiers.rules import Evidence, Tiers
from harness.audit.verification import ancestors, incremental, many, model_only, report_schema
from harness.audit.verification.ancestors import entry_of
from harness.errors import EvidenceIncomplete, UsageError, VerificationFailed
from harness.format import files, layout
from harness.format.layout import RunFolder
from harness.provenance import freshness, history
from harness.provenance.findings import Finding, Findings
from harness.provenance.history import Entry
from harness.provenance.policy import rotation
from harness.provenance.policy import rules as policies
from harness.provenance.policy.rules import Policy, Rotation
from harness.provenance.signing.keys import PublicKey
from harness.provenance.transparency import heads, log
from harness.provenance.transparency.heads import Kept
from harness.terminal import progress
from harness.words import listed

Kind = Literal["run", "checkpoint", "export", "corpus"]

_VERDICTS = {0: "verified", 1: "FAILED", 4: "cannot tell"}
_SIGNED = {layout.CHECKPOINTS, layout.LOG, layout.METRICS, layout.RUN_CONFIG, layout.POLICY}
"""What signatures cover in a run folder."""
_NAMED = 20
"""Names of files that no signature covers, in a note."""


@dataclass(frozen=True)
class Report:
    """The verdict on a folder, with everything that it rests on."""

    target: Path
    kind: Kind
    findings: tuple[Finding, ...]
    passed: Mapping[str, int]
    """Check → how often it passed."""
    notes: tuple[str, ...]
    """What the reader should know and is no failure; what was not checked, too."""
    checkpoints: tuple[OpenedCheckpoint, ...]
    """Those whose story is authentic, in the order of their commits."""
    bytes_hashed: int
    seconds: float
    exit_code: int
    evidence: Evidence
    """What says how far a rerun would repeat it."""
    since: Mapping[str, Any] | None = None
    """What an earlier verification covered, so that it was not hashed again."""
    stamped: Sequence[Stamped] = ()
    """The timestamps of the log that are good under the policy."""
    shown: Mapping[str, str] = field(default_factory=dict)
    """Hex sha256 of a bundle → the earliest moment at which a kept or timestamped head shows it there."""

    @property
    def tiers(self) -> Tiers:
        """How far a rerun would repeat it, as far as the evidence reaches."""
        return tier_rules.compute(self.evidence)

    @property
    def verdict(self) -> str:
        """``verified``, ``FAILED`` or ``cannot tell``."""
        return _VERDICTS[self.exit_code]

    def document(self) -> dict[str, Any]:
        """The report as plain JSON, as `harness.audit.verification.report_schema` describes it."""
        return {
            "format": report_schema.FORMAT,
            "verdict": self.verdict,
            "path": str(self.target),
            "kind": self.kind,
            "findings": [
                {
                    "check": each.check,
                    "kind": "missing" if each.missing else "wrong",
                    "what": each.what,
                    "where": each.where,
                    "remedy": each.remedy,
                }
                for each in self.findings
            ],
            "checks": dict(self.passed),
            "notes": list(self.notes),
            "checkpoints": [_summary(each, self.shown) for each in self.checkpoints],
            "timestamps": [each.document() for each in self.stamped],
            "repeatability": text.document(self.tiers),
            "since": self.since,
            "bytes_hashed": self.bytes_hashed,
            "seconds": round(self.seconds, 3),
        }


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
        return verify_models(path, policy, quiet=quiet)
    keys = _keys(path, policy) if head or since is not None else ()
    load = partial(heads.load, keys=keys, witnesses=policy.witnesses, threshold=policy.witness_threshold)
    earlier = None if since is None else load(since)
    kept = [load(file) for file in head] + ([earlier] if earlier else [])
    policy = replace(policy, log_heads=(*policy.log_heads, *kept))
    is_export, is_corpus = exported.is_export(path), prepared.is_corpus(path)
    if not is_export and not is_corpus and layout.kind_of(path) == "run":
        return verify_run(path, policy, beside=beside, since=earlier, quiet=quiet)
    if earlier is not None:
        what = "--since needs a run folder, whose log it looks into"
        raise UsageError(what, where=str(path), remedy="name the run folder, or leave --since out")
    if is_export:
        return verify_export(path, policy, quiet=quiet)
    if is_corpus:
        return verify_corpus(path, policy, quiet=quiet)
    return verify_checkpoint(path, policy, beside=beside, quiet=quiet)


def _keys(path: Path, policy: Policy) -> Sequence[PublicKey]:
    """Who may have signed a head of the log of ``path``; a hand-over that is wrong is a finding elsewhere."""
    try:
        return handover.trust(path, policy).policy.statement_keys
    except VerificationFailed:
        return policy.statement_keys


def verify_export(folder: Path, policy: Policy, *, quiet: bool = False) -> Report:
    """Check a folder that `harness export` has written. Raises `EnvironmentFault` for a bad disk."""
    return _verify_sealed("export", folder, policy, exported.examine, quiet)


def verify_corpus(folder: Path, policy: Policy, *, quiet: bool = False) -> Report:
    """Check a folder that `harness prepare` has made. Raises `EnvironmentFault` for a bad disk."""
    return _verify_sealed("corpus", folder, policy, lambda *words: prepared.examine(*words)[1:], quiet)


def verify_models(path: Path, policy: Policy, *, quiet: bool = False) -> Report:
    """What the P-256 keys of ``policy`` alone can tell of a run or of one folder: ``cannot tell`` at best.

    Raises `EnvironmentFault` for a disk that cannot be read.
    """
    started = time.perf_counter()
    findings = Findings()
    is_export, is_corpus = exported.is_export(path), prepared.is_corpus(path)
    kind: Kind = "export" if is_export else "corpus" if is_corpus else layout.kind_of(path)
    try:
        folders = _folders(RunFolder(path), findings) if kind == "run" else [path]
        work = [job for folder in folders for job in model_only.examine(folder, policy, findings)]
        with progress(sum(job.entry.size for job in work), "B", "verify", quiet=quiet) as bar:
            hashed = payload.check(work, findings, bar)
    except OSError as error:
        raise files.unreadable(error, str(error.filename or path)) from error
    what = "no Ed25519 key was given: nothing tells which run, step and data the files are from"
    findings.missing("signature", what, str(path), "add --key NAME.ed25519.pub")
    return _report(path, kind, findings, [], hashed, started)


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
        with progress(sum(job.entry.size for job in work), "B", "verify", quiet=quiet) as bar:
            hashed = payload.check(work, findings, bar)
    except OSError as error:
        raise files.unreadable(error, str(error.filename or folder)) from error
    if kind == "export":
        _miss_log(policy, findings, "an exported folder", folder)
    else:
        findings.note("log: not asked for (a corpus has none)")
    freshness.check(policy, times, findings, str(folder))
    return _report(folder, kind, findings, [], hashed, started)


def verify_checkpoint(
    folder: Path, policy: Policy, *, beside: Sequence[Path] = (), quiet: bool = False
) -> Report:
    """Check one checkpoint by itself. Raises `EnvironmentFault` for a disk that cannot be read,
    `EvidenceIncomplete` for one that is removed meanwhile."""
    check = partial(_verify_checkpoint, folder, policy, beside, quiet)
    return undisturbed.read(folder, check, lambda report: report.findings)


def _verify_checkpoint(folder: Path, policy: Policy, beside: Sequence[Path], quiet: bool) -> Report:
    started = time.perf_counter()
    findings, given = Findings(), policy
    shown = seen.beside(folder, policy)
    policy = _trust(folder, policy, shown, findings).policy
    opened = opening.examine_folder(folder, policy, findings, shown.bundles)
    hashed = 0 if opened is None else _hash_payload([opened], findings, quiet)
    if opened is not None and opened.kind == "pruned":
        findings.missing("payload", opening.pruned(folder).what, str(folder), "choose a newer checkpoint")
    if opened is not None and opened.kind == "nonfinite":
        findings.note("the last state of a run that became non-finite: authentic, and no good checkpoint")
    entries = [] if opened is None else [entry_of(opened)]
    _check_starts(entries, beside, policy, findings)
    _tell_policy(entries, given, None, findings)
    _miss_log(policy, findings, "a checkpoint folder", folder)
    times = [_created(each) for each in entries]
    freshness.check(policy, times, findings, str(folder))
    findings.note("lineage and log: not checked (they belong to the run folder)")
    report = _report(folder, "checkpoint", findings, [] if opened is None else [opened], hashed, started)
    return replace(report, shown=shown.bundles)


def _trust(path: Path, policy: Policy, shown: Seen, findings: Findings) -> Trust:
    """Whom to trust, hand-overs in the log counted in, of which ``shown`` tells when they were there."""
    try:
        trust = handover.trust(path, policy, shown)
    except VerificationFailed as error:
        findings.bad(rotation.CHECK, error.what, error.where or str(path), error.remedy)
        return Trust(policy)
    for each in trust.rotations:
        findings.note(f"the key {each.old_id[:16]}… handed over to {each.new_id[:16]}…: {each.reason}")
    if trust.rotations:
        findings.passed.append(rotation.CHECK)
    return trust


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

    return undisturbed.read(root, attempt, lambda report: report.findings)


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
        trust = _trust(root, policy, shown, findings)
        policy = trust.policy
        if policy.witnesses and not policy.log_heads:
            what = "the policy wants a head that witnesses have cosigned, and none is kept"
            findings.missing(heads.CHECK, what, str(root), "give it: --head FILE, or log_head in the policy")
        findings.all_of("file set", _links(run))
        claimed = shown.book or _claimed(run)
        folders = _folders(run, findings)  # after the log: what a job adds meanwhile is not in it yet
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
        latest = [max(told_of, key=_created)] if unlogged else entries
        book = None if unlogged else _read_log(run, claimed, entitled(policy.as_of(shown.whole)), later)
        if book is not None and shown.book is not None and book.head != shown.book.head:
            # It has grown since, and nothing is shown of when this head was signed.
            book = _read_log(run, book, entitled(policy), later)
        continued = book is not None and heads.check(book, policy.log_heads, later, str(run.log))
        covered = incremental.covered(known, book, since) if continued else []
        told = {id(each) for each in covered}
        hashed = _hash_payload([each for each in known if id(each) not in told], findings, quiet)
        if since is not None:
            findings.note(incremental.told(since, covered, continued))
        _check_newest(known, findings)
        history.check_lineage(entries, findings)
        findings.extend(later)
        _check_log(run, known, entries, book, trust.rotations, findings)
        if book is not None:
            stamps.require(book, shown.stamped, policy, findings, str(run.log))
        _check_starts(told_of, beside, policy, findings)
        own_files.check_metrics(run, latest, findings, None if keep is None else keep.lines.append)
        config = own_files.check_config(run, latest, findings)
        if keep is not None:
            keep.config = config
        copy = own_files.check_policy(run, latest, findings)
        _tell_policy(latest, given, copy, findings)
        times = [_created(entry) for entry in told_of]
        freshness.check(policy, [*times, *shown.kept], findings, str(root))
    except OSError as error:
        raise files.unreadable(error, str(error.filename or root)) from error
    if not opened:
        findings.missing("checkpoints", "the run holds no checkpoint", str(root))
    _tell_unsigned(root, findings)
    report = _report(root, "run", findings, known, hashed, started)
    return replace(
        report,
        since=incremental.document(since, covered, continued),
        stamped=tuple(shown.stamped),
        shown=shown.bundles,
    )


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


def _report(
    target: Path,
    kind: Kind,
    findings: Findings,
    opened: Sequence[OpenedCheckpoint],
    hashed: int,
    started: float,
) -> Report:
    ordered = sorted(opened, key=lambda each: (each.statement.sequence, each.statement.step_to))
    return Report(
        target,
        kind,
        tuple(findings.ordered),
        Counter(findings.passed),
        tuple(findings.notes),
        tuple(ordered),
        hashed,
        time.perf_counter() - started,
        findings.exit_code,
        _evidence(kind, findings, ordered),
    )


def _evidence(kind: str, findings: Findings, opened: Sequence[OpenedCheckpoint]) -> Evidence:
    """Nothing counts beside a failure; an export carries no evidence of its own."""
    if findings.failed:
        return Evidence(nothing=f"the verification ended with: {_VERDICTS[findings.exit_code]}")
    if kind == "corpus":
        return Evidence(nothing="a run: a corpus has nothing to replay")
    if kind == "export":
        return Evidence(nothing="an export carries no replays: verify the run that it names")
    return tier_evidence.of_checkpoints(opened)


def _folders(run: RunFolder, findings: Findings) -> list[Path]:
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


def _hash_payload(opened: Sequence[OpenedCheckpoint], findings: Findings, quiet: bool) -> int:
    with_payload = [each for each in opened if each.payload]
    work = [job for each in with_payload for job in payload.jobs(each.folder, each.manifest, each.payload)]
    total = sum(job.entry.size for job in work)
    with progress(total, "B", "verify", quiet=quiet) as bar:
        return payload.check(work, findings, bar)


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


def _check_starts(
    entries: Sequence[Entry], paths: Sequence[Path], policy: Policy, findings: Findings
) -> None:
    """What the run began with, and what that run began with, as far as ``paths`` reach."""
    others = ancestors.read(paths, policy, findings)
    history.check_starts(entries, others, findings, wanted=bool(paths))
    if paths:
        findings.note(f"of the runs given by --with: payload, log and metrics not checked ({_named(paths)})")


def _tell_policy(entries: Sequence[Entry], given: Policy, copy: bytes | None, findings: Findings) -> None:
    """Under which policy the newest of ``entries`` was made; nothing depends on it."""
    named = entries[-1].statement.policy if entries else None
    if named is not None:
        findings.note(made_under.told(named, given, copy))


def _created(entry: Entry) -> str:
    return str(entry.statement.predicate["created"])


def _named(paths: Sequence[Path]) -> str:
    return ", ".join(f"harness verify {path}" for path in paths)


def _entitled(policy: Policy, entries: Sequence[Entry], rotations: Sequence[Rotation]) -> Policy:
    """Whoever may sign the head of the log that ends with the newest of ``entries`` or a hand-over."""
    if rotations:
        # The record of a hand-over stands after the checkpoints of the old key, whatever time they state.
        policy = policy.without(rotation.handed_over(rotations)).untimed()
    if not entries:
        return policy
    newest = entries[-1].statement
    return policy.within(newest.run_id, newest.run_name, _created(entries[-1]), policies.LOG)


def _claimed(run: RunFolder) -> log.Log | None:
    """The run's log as it claims to be; None for one that cannot be read, a finding where it is checked."""
    try:
        return log.read_claimed(run.log)
    except (VerificationFailed, EvidenceIncomplete):
        return None


def _read_log(run: RunFolder, claimed: log.Log | None, signing: Policy, findings: Findings) -> log.Log | None:
    """The run's log under a head that ``signing`` lets somebody sign; None with a finding."""
    return findings.attempt("log", log.read, run.log, signing.statement_keys, claimed)


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


def _summary(opened: OpenedCheckpoint, shown: Mapping[str, str]) -> dict[str, Any]:
    statement = opened.statement
    return {
        "name": os.path.basename(opened.folder),
        "kind": opened.kind,
        "checkpoint": opened.checkpoint_id,
        "run": statement.run_id,
        "sequence": statement.sequence,
        "steps": {"from": statement.step_from, "to": statement.step_to},
        "policy": statement.policy,
        "signers": list(opened.signers),
        "key_id": opened.signer,
        "bytes": opened.size,
        "shown_at": shown.get(opened.bundle_sha256),
    }
