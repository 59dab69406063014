"""Opening a checkpoint: every check except reading the payload's bytes.

In this order, so that nothing is interpreted before it is authenticated:

- sizes are capped and files opened without following links
- the statement's signature is checked over its raw bytes, then its types, then its JSON, then its fields
- MANIFEST.json is the one that the statement names by sha256, and dirHash agrees
- the folder holds exactly the manifest's files: regular, one link, of the listed sizes, and nothing else
- safetensors headers describe exactly the manifest's tensors
- model.sig, when a P-256 key is given, signs exactly these files
- trainer.json, read with its digest checked, agrees with the statement's step

A resume then hashes each payload file while it loads it; `harness verify` hashes them all.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from harness.errors import VerificationFailed
from harness.format import files, layout, safetensors_header, strict_json
from harness.format.manifest import FileEntry, Manifest, checkpoint_id, dir_hash
from harness.provenance import envelope, model_signature, statements
from harness.provenance.policy import Policy
from harness.provenance.statements import CheckpointStatement

MANIFEST_LIMIT = 64 << 20
"""Largest MANIFEST.json that is read, in bytes."""
_TRAINER_LIMIT = 64 << 20


@dataclass(frozen=True)
class OpenedCheckpoint:
    """A checkpoint whose story is authentic and whose files are the listed ones, contents aside."""

    folder: Path
    manifest: Manifest
    manifest_bytes: bytes
    checkpoint_id: str
    statement: CheckpointStatement
    signer: str
    """Key id of the key that signed the statement."""
    bundle_sha256: str
    """Of provenance/checkpoint.sigstore.json, as the log records it."""


def open_checkpoint(folder: Path, policy: Policy) -> OpenedCheckpoint:
    """Check everything but the payload's bytes. Raises `VerificationFailed` or `EvidenceIncomplete`."""
    opened = open_statement(folder, policy)
    check_file_set(folder, opened.manifest)
    check_headers(folder, opened.manifest)
    check_model_signature(opened, policy)
    _check_trainer(opened)
    return opened


def open_statement(folder: Path, policy: Policy) -> OpenedCheckpoint:
    """Statement and manifest alone: all that is left of a pruned checkpoint."""
    path = folder / layout.CHECKPOINT_BUNDLE
    bundle = files.read_limited(path, envelope.LIMIT)
    opened = envelope.open_bundle(bundle, policy.statement_keys, where=str(path))
    statement = statements.parse_checkpoint(opened.payload, where=str(path))
    data = files.read_limited(folder / layout.MANIFEST, MANIFEST_LIMIT)
    identity = checkpoint_id(data)
    where = str(folder / layout.MANIFEST)
    if identity != statement.subject_id:
        raise VerificationFailed("is not the manifest that the statement is about", where=where)
    manifest = Manifest.parse(data, where=where)
    covered = [(entry.path, entry.sha256) for entry in manifest.files] + [(layout.MANIFEST, identity)]
    if dir_hash(covered) != statement.dir_hash:
        raise VerificationFailed("has another dirHash than the statement", where=where)
    digest = hashlib.sha256(bundle).hexdigest()
    return OpenedCheckpoint(folder, manifest, data, identity, statement, opened.key.key_id, digest)


def check_file_set(folder: Path, manifest: Manifest) -> None:
    """Raise `VerificationFailed` unless the folder holds exactly the manifest's files and the signatures."""
    expected = {entry.path: entry.size for entry in manifest.files}
    signatures = {layout.MANIFEST, layout.MODEL_SIGNATURE}
    seen = set()
    for path, status in walk(folder):
        if path in expected:
            seen.add(path)
            if status.st_size != expected[path]:
                what = f"has {status.st_size} bytes, the manifest says {expected[path]}"
                raise VerificationFailed(what, where=str(folder / path))
        elif path not in signatures and not _is_bundle(path):
            raise VerificationFailed("is not in the manifest", where=str(folder / path))
    missing = sorted(set(expected) - seen)
    if missing:
        raise VerificationFailed("is in the manifest, not in the folder", where=str(folder / missing[0]))


def walk(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Every file under ``folder`` with its status. Raises `VerificationFailed` for anything that is no plain
    file with one link, and for an empty folder, which no manifest can list."""
    pending = [""]
    while pending:
        prefix = pending.pop()
        with os.scandir(folder / prefix) as entries:
            names = sorted(entry.name for entry in entries)
        if not names:
            raise VerificationFailed("is an empty folder", where=str(folder / prefix))
        for name in names:
            path = f"{prefix}{name}"
            status = os.lstat(folder / path)
            if stat.S_ISDIR(status.st_mode):
                pending.append(f"{path}/")
            else:
                files.check_regular(status, str(folder / path))
                yield path, status


def check_headers(folder: Path, manifest: Manifest) -> None:
    """Raise `VerificationFailed` unless each safetensors header describes the manifest's tensors."""
    listed: dict[str, list[tuple[str, str, tuple[int, ...], int, int]]] = {
        entry.path: [] for entry in manifest.files if entry.path.endswith(".safetensors")
    }
    for tensor in manifest.tensors:
        if tensor.file not in listed:
            raise VerificationFailed(f"lists the tensor `{tensor.name}` of a file that is no safetensors file",
                                     where=str(folder / layout.MANIFEST))  # fmt: skip
        listed[tensor.file].append((tensor.name, tensor.dtype, tensor.shape, tensor.start, tensor.end))
    for path, tensors in listed.items():
        header = safetensors_header.read_header(folder / path)
        found = [(span.name, span.dtype, span.shape, span.start, span.end) for span in header.tensors]
        if sorted(found) != sorted(tensors):
            odd = sorted({item[0] for item in set(found) ^ set(tensors)})
            what = f"describes other tensors than the manifest, first `{odd[0] if odd else ''}`"
            raise VerificationFailed(what, where=str(folder / path))


def check_model_signature(opened: OpenedCheckpoint, policy: Policy) -> bool:
    """Whether model.sig was checked; it is when the policy has a P-256 key, and is then required."""
    if not policy.model_keys:
        return False
    path = opened.folder / layout.MODEL_SIGNATURE
    signed = model_signature.verify(
        files.read_limited(path, envelope.LIMIT), policy.model_keys, where=str(path)
    )
    listed = {entry.path: entry.sha256 for entry in opened.manifest.files}
    if signed != {**listed, layout.MANIFEST: opened.checkpoint_id}:
        raise VerificationFailed("signs other files than the manifest lists", where=str(path))
    return True


def read_payload(opened: OpenedCheckpoint, path: str, limit: int) -> bytes:
    """A small payload file whose digest is the manifest's. Raises `VerificationFailed`."""
    entry = _entry(opened.manifest, path)
    where = str(opened.folder / path)
    if entry is None:
        raise VerificationFailed("is not in the manifest", where=where)
    data = files.read_limited(opened.folder / path, limit)
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise VerificationFailed("the sha256 is not the one in MANIFEST.json", where=where)
    return data


def _check_trainer(opened: OpenedCheckpoint) -> None:
    where = str(opened.folder / layout.TRAINER)
    document = strict_json.loads(read_payload(opened, layout.TRAINER, _TRAINER_LIMIT), where=where)
    step = document.get("step") if isinstance(document, dict) else None
    if step != opened.statement.step_to:
        what = f"is of step {step}, the statement of step {opened.statement.step_to}"
        raise VerificationFailed(what, where=where)


def _entry(manifest: Manifest, path: str) -> FileEntry | None:
    return next((entry for entry in manifest.files if entry.path == path), None)


def _is_bundle(path: str) -> bool:
    folder, _, name = path.rpartition("/")
    return folder == layout.PROVENANCE and name.endswith(".sigstore.json")
