"""Sealing a checkpoint, an export or a corpus before it is published: manifest, model.sig and statements.

Nothing is synced here: `harness.format.files.publish` does. Each function raises `VerificationFailed` when
the manifest or the predicate would be refused by a verifier.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.format import layout
from harness.format.manifest import Manifest, checkpoint_id, dir_hash
from harness.provenance import corpora, exports, statements
from harness.provenance.signing import envelope, model_signature
from harness.provenance.signing.keys import Signer, public_keys


@dataclass(frozen=True)
class Sealed:
    """What identifies the sealed checkpoint."""

    checkpoint_id: str
    bundle_sha256: str
    """Hex sha256 of provenance/checkpoint.sigstore.json, as the log records it."""


def seal(folder: Path, manifest: Manifest, name: str, predicate: Mapping[str, Any], signer: Signer) -> Sealed:
    """Write MANIFEST.json, model.sig (with a P-256 key of ``signer``) and both statements into ``folder``.

    ``name`` is the checkpoint's folder name once published.
    """
    makers = {
        layout.CHECKPOINT_BUNDLE: statements.checkpoint_statement,
        layout.SLSA_BUNDLE: statements.slsa_statement,
    }
    identity, bundles = _seal(folder, manifest, name, predicate, signer, makers)
    return Sealed(identity, hashlib.sha256(bundles[layout.CHECKPOINT_BUNDLE]).hexdigest())


def seal_corpus(
    folder: Path, manifest: Manifest, name: str, predicate: Mapping[str, Any], signer: Signer
) -> str:
    """The same for a prepared corpus, with one statement; returns the corpus id."""
    makers = {layout.CORPUS_BUNDLE: corpora.corpus_statement}
    return _seal(folder, manifest, name, predicate, signer, makers)[0]


def seal_export(
    folder: Path, manifest: Manifest, name: str, predicate: Mapping[str, Any], signer: Signer
) -> str:
    """The same for an export, with one statement; returns the export id."""
    makers = {layout.EXPORT_BUNDLE: exports.export_statement}
    return _seal(folder, manifest, name, predicate, signer, makers)[0]


def _seal(
    folder: Path,
    manifest: Manifest,
    name: str,
    predicate: Mapping[str, Any],
    signer: Signer,
    makers: Mapping[str, Callable[..., bytes]],
) -> tuple[str, dict[str, bytes]]:
    """``makers`` has what makes a statement, by the path of its bundle. Returns the manifest's sha256 and the
    bundles by their paths."""
    data = manifest.to_bytes()
    Manifest.parse(data, where=name)
    identity = checkpoint_id(data)
    covered = [*manifest.digests.items(), (layout.MANIFEST, identity)]
    directory = dir_hash(covered)
    ed25519, *p256 = public_keys(signer)
    bundles = {}
    for path, make in makers.items():
        statement = make(subject_id=identity, dir_hash=directory, name=name, predicate=predicate)
        bundles[path] = envelope.sign(statement, signer.ed25519, ed25519)
    (folder / layout.PROVENANCE).mkdir()
    (folder / layout.MANIFEST).write_bytes(data)
    for path, bundle in bundles.items():
        (folder / path).write_bytes(bundle)
    if signer.p256 is not None:
        signature = model_signature.sign(covered, signer.p256, p256[0], name)
        (folder / layout.MODEL_SIGNATURE).write_bytes(signature)
    return identity, bundles
