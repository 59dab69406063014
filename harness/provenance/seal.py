"""Sealing a checkpoint or a corpus before it is published: manifest, model.sig and statements."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.format import layout
from harness.format.manifest import Manifest, checkpoint_id, dir_hash
from harness.provenance import corpora, envelope, model_signature, statements
from harness.provenance.keys import Signer, public_keys


@dataclass(frozen=True)
class Sealed:
    """What identifies the sealed checkpoint."""

    checkpoint_id: str
    bundle_sha256: str
    """Hex sha256 of provenance/checkpoint.sigstore.json, as the log records it."""


def seal(folder: Path, manifest: Manifest, name: str, predicate: Mapping[str, Any], signer: Signer) -> Sealed:
    """Write MANIFEST.json, model.sig (with a P-256 key of ``signer``) and both statements into ``folder``.

    ``name`` is the checkpoint's folder name once published. Nothing is synced: `harness.format.files.publish`
    does. Raises `VerificationFailed` when ``manifest`` or ``predicate`` would be refused by a verifier.
    """
    data = manifest.to_bytes()
    Manifest.parse(data, where=name)
    identity = checkpoint_id(data)
    covered = [*manifest.digests.items(), (layout.MANIFEST, identity)]
    directory = dir_hash(covered)
    ed25519, *p256 = public_keys(signer)
    bundle, slsa = (
        envelope.sign(
            make(checkpoint_id=identity, dir_hash=directory, name=name, predicate=predicate),
            signer.ed25519,
            ed25519,
        )
        for make in (statements.checkpoint_statement, statements.slsa_statement)
    )
    (folder / layout.PROVENANCE).mkdir()
    (folder / layout.MANIFEST).write_bytes(data)
    (folder / layout.CHECKPOINT_BUNDLE).write_bytes(bundle)
    (folder / layout.SLSA_BUNDLE).write_bytes(slsa)
    if signer.p256 is not None:
        signature = model_signature.sign(covered, signer.p256, p256[0], name)
        (folder / layout.MODEL_SIGNATURE).write_bytes(signature)
    return Sealed(identity, hashlib.sha256(bundle).hexdigest())


def seal_corpus(
    folder: Path, manifest: Manifest, name: str, predicate: Mapping[str, Any], signer: Signer
) -> str:
    """The same for a prepared corpus, with one statement; returns the corpus id."""
    data = manifest.to_bytes()
    Manifest.parse(data, where=name)
    identity = checkpoint_id(data)
    covered = [*manifest.digests.items(), (layout.MANIFEST, identity)]
    ed25519, *p256 = public_keys(signer)
    statement = corpora.corpus_statement(
        corpus_id=identity, dir_hash=dir_hash(covered), name=name, predicate=predicate
    )
    (folder / layout.PROVENANCE).mkdir()
    (folder / layout.MANIFEST).write_bytes(data)
    (folder / layout.CORPUS_BUNDLE).write_bytes(envelope.sign(statement, signer.ed25519, ed25519))
    if signer.p256 is not None:
        signature = model_signature.sign(covered, signer.p256, p256[0], name)
        (folder / layout.MODEL_SIGNATURE).write_bytes(signature)
    return identity
