"""What exported folders and prepared corpora share: a signed statement about a manifest of all else."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from harness.audit.folders import file_set
from harness.errors import EvidenceIncomplete, VerificationFailed
from harness.format import files, layout
from harness.format.manifest import Manifest
from harness.provenance.checks import REMEDIES
from harness.provenance.findings import Findings
from harness.provenance.policy import rules as policies
from harness.provenance.policy.rules import Policy
from harness.provenance.signing import model_signature
from harness.provenance.signing.keys import PublicKey


class Statement(Protocol):
    """A statement about a folder."""

    @property
    def subject_id(self) -> str:
        """Hex sha256 of the folder's MANIFEST.json."""
        ...

    @property
    def dir_hash(self) -> str:
        """``h1:…`` over the listed files and MANIFEST.json."""
        ...

    @property
    def predicate(self) -> Mapping[str, Any]:
        """What it says, among it when it was ``created``."""
        ...


def manifest(folder: Path, statement: Statement) -> Manifest:
    """The manifest that ``statement`` is about. Raises `VerificationFailed` for any other."""
    where = str(folder / layout.MANIFEST)
    data = files.read_limited(folder / layout.MANIFEST, file_set.MANIFEST_LIMIT)
    return Manifest.stated(data, statement.subject_id, statement.dir_hash, where=where)


def check_signer(
    policy: Policy, key: PublicKey, run_id: str, run_name: str, created: str, kind: str, *, where: str
) -> None:
    """Raise `VerificationFailed` unless ``policy`` lets the owner of ``key`` sign that, as
    `Identity.objection` has it."""
    objection = policy.identity(key).objection(run_id, run_name, created, kind, key_id=key.key_id)
    if objection is not None:
        raise VerificationFailed(objection, where=where, remedy=REMEDIES["policy"].wrong)


def check_model_signature(
    folder: Path,
    policy: Policy,
    listed: Manifest,
    statement: Statement,
    present: Mapping[str, os.stat_result],
    findings: Findings,
    *,
    kind: str,
    about: Sequence[tuple[str, str]],
) -> None:
    """model.sig, where it is there or required, signs exactly the files listed, under a key of whoever
    may sign that, or a statement of ``kind``, for all of ``about``: id and name of runs, or of a corpus."""
    required = policies.MODEL_SIGNATURE in policy.required
    if not policy.model_keys and not required:
        findings.note("model.sig: not checked (no P-256 key given)")
    elif required or layout.MODEL_SIGNATURE in present:
        keys = _entitled(policy, str(statement.predicate["created"]), kind, about)
        findings.attempt("model signature", _model_signature, folder, keys, listed, statement)


def _entitled(policy: Policy, created: str, kind: str, about: Sequence[tuple[str, str]]) -> list[PublicKey]:
    def may(key: PublicKey, of: str, name: str) -> bool:
        whose = policy.identity(key)
        kinds = (kind, policies.MODEL_SIGNATURE)
        return any(whose.objection(of, name, created, each, key_id=key.key_id) is None for each in kinds)

    return [key for key in policy.model_keys if all(may(key, *each) for each in about)]


def _model_signature(folder: Path, keys: Sequence[PublicKey], listed: Manifest, statement: Statement) -> None:
    path = folder / layout.MODEL_SIGNATURE
    if not path.is_file():
        raise EvidenceIncomplete("is missing", where=str(path), remedy="get the whole folder from its maker")
    data = files.read_limited(path, file_set.MANIFEST_LIMIT)
    names = {**listed.digests, layout.MANIFEST: statement.subject_id}
    model_signature.check(data, keys, names, folder.name, where=str(path))
