"""Adding a statement to a checkpoint that exists: a file in ``provenance/``, and a record in the run's log.

Example, for whoever has re-executed a segment::

    opened = opening.open_checkpoint(folder, policy)
    added = attest.add(opened, later.REPLAY, predicate, signer)

Only a checkpoint that was opened, hence verified, gets a statement. The file appears by one rename under the
next free number, and is on disk before the record is. The log's head has one signer, the run's own: somebody
else's statement stays out of the log until that signer calls `enter`, and `harness verify` says so.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.audit.folders.opening import OpenedCheckpoint
from harness.errors import UsageError, VerificationFailed, storage_fault
from harness.format import files, layout
from harness.format.layout import RunFolder
from harness.provenance import later, log_record
from harness.provenance.signing import envelope
from harness.provenance.signing.keyless import KeylessSigner
from harness.provenance.signing.keys import Signer, public_keys
from harness.provenance.transparency import log


@dataclass(frozen=True)
class Added:
    """A statement that is on disk."""

    path: Path
    name: str
    """``replay-0``."""
    bundle_sha256: str
    record: int | None
    """Its number in the run's log; None when it was not entered."""
    reason: str
    """Why it was entered, or was not."""


def add(
    opened: OpenedCheckpoint,
    kind: str,
    predicate: Mapping[str, Any],
    signer: Signer | KeylessSigner,
    *,
    predicate_type: str | None = None,
) -> Added:
    """Sign ``predicate`` as a statement of ``kind`` (`harness.provenance.later`) about ``opened``.

    Raises `VerificationFailed` for a predicate that departs from the kind's schema or a log that is not in
    order, `UsageError` for an unknown kind without ``predicate_type``, `EnvironmentFault` for a full disk.
    """
    payload = later.build(kind, predicate, opened.statement, predicate_type)
    return _write(opened, kind, payload, signer)


def countersign(opened: OpenedCheckpoint, signer: Signer | KeylessSigner) -> Added:
    """Sign the checkpoint's own statement, the same bytes, with another key.

    Raises `UsageError` when ``signer`` is the one that made it, else as `add`.
    """
    if isinstance(signer, Signer) and signer.ed25519_id == opened.signer:
        remedy = "countersign with another: --signing-key KEY"
        raise UsageError(
            "this key has signed the checkpoint already", where=str(opened.folder), remedy=remedy
        )
    path = opened.folder / layout.CHECKPOINT_BUNDLE
    bundle = files.read_limited(path, envelope.LIMIT)
    if hashlib.sha256(bundle).hexdigest() != opened.bundle_sha256:
        raise VerificationFailed("was changed since it was verified", where=str(path))
    payload = envelope.unauthenticated_payload(bundle, where=str(path))
    return _write(opened, later.COUNTERSIGNATURE, payload, signer)


def enter(opened: OpenedCheckpoint, signer: Signer) -> list[str]:
    """Enter every statement of ``opened`` that the log does not name yet; returns their names.

    Raises `UsageError` outside a run and for another signer than the log's.
    """
    run = _run_of(opened)
    if run is None:
        remedy = "name the checkpoint in its run folder"
        raise UsageError("does not lie in a run, so there is no log", where=str(opened.folder), remedy=remedy)
    with files.locked(opened.folder / layout.PROVENANCE):
        book = log.read(run.log, public_keys(signer))
        known = _logged(book, opened.checkpoint_id, str(run.log))
        names = sorted(set(opened.later) - known)
        for name in names:
            _append(run, opened, name, opened.later[name], signer)
    return names


def _write(opened: OpenedCheckpoint, kind: str, payload: bytes, signer: Signer | KeylessSigner) -> Added:
    if isinstance(signer, Signer):
        bundle = envelope.sign(payload, signer.ed25519, public_keys(signer)[0])
    else:
        bundle = signer.sign(payload, where=str(opened.folder))
    if len(bundle) > later.LIMIT:
        what = f"a statement of {len(bundle)} bytes is over the limit of {later.LIMIT}"
        raise UsageError(what, remedy="shorten the predicate: name large files by their digest")
    try:
        name = _publish(opened.folder, kind, bundle)
    except OSError as error:
        raise storage_fault(error, "adding a statement", opened.folder) from error
    digest = hashlib.sha256(bundle).hexdigest()
    record, reason = _enter_own(opened, name, digest, signer)
    if isinstance(signer, KeylessSigner) or signer.ed25519_id != opened.signer:
        reason += "; whoever verifies it trusts this signer, too, or finds it wrong"
    return Added(opened.folder / later.path_of(name), name, digest, record, reason)


def _publish(folder: Path, kind: str, bundle: bytes) -> str:
    """Write the bundle under the next free number. The temporary lies beside the checkpoint's folder, since
    whatever is left over in it would make it another one."""
    provenance = folder / layout.PROVENANCE
    with files.locked(provenance):
        number = 0
        while os.path.lexists(folder / later.path_of(f"{kind}-{number}")):
            number += 1
        name = f"{kind}-{number}"
        files.write_durable(
            folder / later.path_of(name),
            bundle,
            temporary=files.real(folder).parent / f"{layout.TEMPORARY}{files.real(folder).name}-{name}",
        )
    return name


def _enter_own(
    opened: OpenedCheckpoint, name: str, digest: str, signer: Signer | KeylessSigner
) -> tuple[int | None, str]:
    run = _run_of(opened)
    if run is None:
        return None, "the checkpoint lies in no run"
    if isinstance(signer, KeylessSigner):
        return None, "a key signs the run's log; its owner can: harness attest CKPT --enter"
    head = run.log / log.HEAD
    note = files.read_limited(head, log.NOTE_LIMIT)
    try:
        log.open_note(note, public_keys(signer), where=str(head))
    except VerificationFailed:
        return None, "another key signs the run's log; its owner can: harness attest CKPT --enter"
    return _append(run, opened, name, digest, signer), "entered in the run's log"


def _append(run: RunFolder, opened: OpenedCheckpoint, name: str, digest: str, signer: Signer) -> int:
    run_id = opened.statement.run_id
    record = log_record.statement_record(run_id, opened.checkpoint_id, name, digest)
    return log.append(run.log, record, signer, log_record.origin_of(run_id)).size - 1


def _logged(book: log.Log, checkpoint: str, where: str) -> set[str]:
    records = (log_record.parse_record(each, where=where) for each in book.records)
    return {
        each["name"] for each in records if log_record.is_statement(each) and each["checkpoint"] == checkpoint
    }


def _run_of(opened: OpenedCheckpoint) -> RunFolder | None:
    """The run that the checkpoint's folder lies in, if that has a log."""
    parent = files.real(opened.folder).parent
    run = RunFolder(parent.parent)
    return run if parent.name == layout.CHECKPOINTS and (run.log / log.HEAD).is_file() else None
