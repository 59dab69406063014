"""A checkpoint folder, examined: every check except reading the payload's bytes.

In this order, so that nothing is interpreted before it is authenticated (`harness.provenance.checks`):

- sizes are capped and files opened without following links
- signatures, statements and the manifest, by the rules of `harness.provenance.verifier`
- the folder holds exactly the manifest's files: regular, one link, of the listed sizes, and nothing else
- safetensors headers describe exactly the manifest's tensors
- trainer.json and ledger.json, read with their digests checked, agree with the statement

A resume then hashes each payload file while it loads it; `harness verify` hashes them all.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from harness.audit.folders import file_set, payload
from harness.audit.folders.payload import Job
from harness.audit.run import handover, seen
from harness.errors import EvidenceIncomplete, VerificationFailed
from harness.format import files, layout
from harness.format.layout import FolderKind
from harness.format.manifest import FileEntry, Manifest
from harness.provenance import agreement, later, verifier
from harness.provenance.checks import Check
from harness.provenance.evidence import Evidence
from harness.provenance.findings import Findings
from harness.provenance.policy.rules import Policy
from harness.provenance.signers import Added
from harness.provenance.signing import envelope
from harness.provenance.statements import CheckpointStatement

_SIGNATURES = (layout.MANIFEST, layout.MODEL_SIGNATURE, layout.CHECKPOINT_BUNDLE, layout.SLSA_BUNDLE)


@dataclass(frozen=True)
class OpenedCheckpoint:
    """A checkpoint whose story is authentic and whose files are the listed ones, contents aside."""

    folder: Path
    manifest_bytes: bytes
    payload: Mapping[str, files.Stamp]
    """Files of the manifest that are plain files of the listed size, as they were when their names, sizes and
    headers were checked; the others are findings already."""
    checkpoint_id: str
    statement: CheckpointStatement
    kind: FolderKind
    """What its folder's name says it is."""
    signers: tuple[str, ...]
    """Names of the policy's identities that have signed the statement."""
    signer: str
    """Key id of the key that signed provenance/checkpoint.sigstore.json."""
    bundle_sha256: str
    """Of provenance/checkpoint.sigstore.json, as the log records it."""
    later: Mapping[str, str]
    """Name → hex sha256 of the statements that were added afterwards, as the log records them."""
    added: tuple[Added, ...]
    """What those of them say that are good."""

    @cached_property
    def manifest(self) -> Manifest:
        """What the checkpoint consists of."""
        return Manifest.parse(self.manifest_bytes, where=str(self.folder / layout.MANIFEST))

    @cached_property
    def size(self) -> int:
        """Bytes of the payload that the manifest lists."""
        return sum(entry.size for entry in self.manifest.files)

    @property
    def jobs(self) -> list[Job]:
        """What is left to hash."""
        return payload.jobs(self.folder, self.manifest, self.payload) if self.payload else []

    def __getstate__(self) -> dict[str, Any]:
        """Sent from process to process without what `manifest` has parsed, which few look at again; its
        `size`, which a report tells, is taken from it before."""
        if "manifest" in vars(self):
            _ = self.size
        return {name: value for name, value in vars(self).items() if name != "manifest"}


def open_checkpoint(folder: Path, policy: Policy) -> OpenedCheckpoint:
    """Check everything but the payload's bytes, and raise the first failure.

    Raises `VerificationFailed` for what is wrong, `EvidenceIncomplete` for what is not there (a pruned
    checkpoint's payload, too), `EnvironmentFault` for a disk that cannot be read.
    """
    findings = Findings()
    shown = seen.beside(folder, policy)
    trusted = handover.trust(folder, policy, shown).policy
    opened = examine_folder(folder, trusted, findings, shown.bundles)
    findings.raise_first()
    if opened is None:
        raise VerificationFailed("could not be examined", where=str(folder))
    if opened.kind == "pruned":
        raise pruned(folder)
    return opened


def pruned(folder: Path) -> EvidenceIncomplete:
    """Why a checkpoint without payload cannot be told good."""
    return EvidenceIncomplete(
        "the payload was removed by checkpoint.keep; the signatures over it are all that is left",
        where=str(folder),
        remedy="choose a newer checkpoint",
    )


def examine_folder(
    folder: Path,
    policy: Policy,
    findings: Findings,
    seen: Mapping[str, str] | None = None,
    known: Mapping[str, str] | None = None,
) -> OpenedCheckpoint | None:
    """Collect every failure in ``folder`` but those of payload bytes; None for a story that is not authentic.

    ``seen``: hex sha256 of a bundle → the moment at which a kept or timestamped log head shows it there.
    ``known``: hex sha256 of a statement's bundle → checkpoint id, of what was verified before.

    Raises `EnvironmentFault` for a disk that cannot be read.
    """
    try:
        return _examine(folder, policy, findings, seen or {}, known or {})
    except OSError as error:
        raise files.unreadable(error, str(error.filename or folder)) from error


def _examine(
    folder: Path, policy: Policy, findings: Findings, seen: Mapping[str, str], known: Mapping[str, str]
) -> OpenedCheckpoint | None:
    if not stat.S_ISDIR(os.lstat(folder).st_mode):
        findings.bad("file set", "is not a folder", str(folder), "give the folder itself")
        return None
    name = layout.name_of(folder)
    kind, _ = layout.kind_of_name(name)
    if kind == "damaged":
        findings.bad("file set", "was set aside as damaged by a resume", str(folder), "choose another one")
        return None
    present = file_set.listing(folder, findings)
    evidence = _read(folder, name, present, findings, seen, known)
    examined = verifier.examine(evidence, policy, findings)
    if examined is None or evidence.manifest is None:
        return None
    manifest = examined.manifest
    added = {path for path in present if later.name_of(path) is not None}
    signatures = {*_SIGNATURES, *added}
    there: Mapping[str, files.Stamp] = {}
    if kind == "pruned" and present.keys() <= signatures:
        findings.passed.append("file set")
    else:
        if manifest is None:
            where = str(folder / layout.MANIFEST)
            manifest = findings.attempt("manifest", Manifest.parse, evidence.manifest, where=where)
        if manifest is None:
            return None
        file_set.check_files(folder, manifest, present, signatures, findings, whole=kind != "pruned")
        _check_contents(folder, manifest, present, examined.statement, findings)
        there = payload.stamps(manifest, present)
    opened = OpenedCheckpoint(
        folder=folder,
        manifest_bytes=evidence.manifest,
        payload=there,
        checkpoint_id=examined.checkpoint_id,
        statement=examined.statement,
        kind=kind,
        signers=examined.signers,
        signer=examined.key_id,
        bundle_sha256=examined.bundle_sha256,
        later=examined.later,
        added=examined.added,
    )
    if manifest is not None:
        vars(opened)["manifest"] = manifest
    return opened


def _check_contents(
    folder: Path,
    manifest: Manifest,
    present: Mapping[str, os.stat_result],
    statement: CheckpointStatement,
    findings: Findings,
) -> None:
    """Of the payload that is there, what it says of itself: headers, and files that repeat the statement."""
    file_set.check_headers(folder, manifest, present, findings)
    for entry in manifest.files:
        if entry.path in _FACTS and entry.path in present:
            _check_facts(folder, entry, *_FACTS[entry.path], statement, findings)


def _read(
    folder: Path,
    name: str,
    present: dict[str, os.stat_result],
    findings: Findings,
    seen: Mapping[str, str],
    known: Mapping[str, str],
) -> Evidence:
    def read(path: str, limit: int) -> bytes | None:
        if path not in present:
            return None
        return findings.attempt("sizes", files.read_limited, f"{folder}/{path}", limit)

    paths = [path for path in present if later.name_of(path) is not None]
    if len(paths) > later.MOST:
        findings.bad("sizes", f"holds more than {later.MOST} later statements", str(folder))
    added = {path: read(path, later.LIMIT) for path in paths[: later.MOST]}
    bundle = read(layout.CHECKPOINT_BUNDLE, envelope.LIMIT)
    manifest = read(layout.MANIFEST, file_set.MANIFEST_LIMIT)
    digest = hashlib.sha256(bundle or b"").hexdigest()
    is_known = verifier.is_known(known, digest, manifest)
    is_left = verifier.is_left(name, is_known)
    return Evidence(
        where=str(folder),
        name=name,
        bundle=bundle,
        bundle_sha256=digest,
        manifest=manifest,
        slsa=None if is_left else read(layout.SLSA_BUNDLE, envelope.LIMIT),
        model_signature=None if is_left else read(layout.MODEL_SIGNATURE, file_set.MANIFEST_LIMIT),
        there=present.keys(),
        later={path: data for path, data in added.items() if data is not None},
        seen=seen,
        is_known=is_known,
    )


_Disagreements = Callable[[bytes, CheckpointStatement, str], Iterator[tuple[str, str]]]
_FACTS: Mapping[str, tuple[Check, _Disagreements]] = {
    layout.TRAINER: ("trainer.json", agreement.trainer_disagreements),
    layout.LEDGER: ("ledger.json", agreement.ledger_disagreements),
}


def _check_facts(
    folder: Path,
    entry: FileEntry,
    check: Check,
    disagreements: _Disagreements,
    statement: CheckpointStatement,
    findings: Findings,
) -> None:
    """That a small file says nothing else than the statement, once its digest is right."""
    data = findings.attempt(check, file_set.read_listed, folder, entry)
    if data is not None:
        where = str(folder / entry.path)
        found = findings.attempt(check, lambda: list(disagreements(data, statement, where)))
        findings.all_of(check, iter(found or ()))
