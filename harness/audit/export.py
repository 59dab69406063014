"""A checkpoint as a Hugging Face folder, with its provenance carried along. Needs no torch.

- the checkpoint is opened under a policy, and every byte that is exported is compared with the signed digest
  while it is read: what was verified is what is written
- weights under the names of a Hugging Face architecture where it computes the same (`hugging_face`), else as
  they are, with the reason
- MANIFEST.json lists the exported files and tensors; ``provenance/export.sigstore.json`` is signed by whoever
  exports, and names the checkpoint; ``provenance/source.sigstore.json`` is the checkpoint's own statement,
  unchanged; model.sig covers payload and MANIFEST.json
- the folder appears by one rename; the weights' bytes are a function of the checkpoint alone
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import harness
from harness.audit import hugging_face, opening
from harness.audit.hugging_face import Layout
from harness.audit.opening import OpenedCheckpoint
from harness.errors import UsageError, VerificationFailed
from harness.format import files, layout, safetensors_header, strict_json
from harness.format.manifest import FileEntry, Manifest, TensorEntry, checkpoint_id, dir_hash
from harness.format.safetensors_header import BITS
from harness.format.tensor_digests import tensor_digest
from harness.provenance import envelope, exports, model_signature
from harness.provenance.keys import Signer, public_keys
from harness.provenance.policy import Policy
from harness.terminal import progress

_WEIGHTS = "model.safetensors"
_CONFIG, _TOKENIZER, _TOKENIZER_CONFIG = "config.json", "tokenizer.json", "tokenizer_config.json"
_SMALL = 64 << 20
_END_OF_DOCUMENT = "<|endoftext|>"
_BYTES_VOCABULARY = 257


@dataclass(frozen=True)
class Exported:
    """What was written."""

    folder: Path
    export_id: str
    """Hex sha256 of its MANIFEST.json."""
    layout: Layout
    source: Mapping[str, Any]
    notes: tuple[str, ...]


def export(
    checkpoint: Path, target: Path, policy: Policy, signer: Signer, *, quiet: bool = False
) -> Exported:
    """Write the weights of ``checkpoint`` to the new folder ``target``.

    Raises `UsageError` when ``target`` exists, `VerificationFailed` or `EvidenceIncomplete` when the
    checkpoint does not verify; then nothing is left behind.
    """
    if target.exists() or target.is_symlink():
        raise UsageError("the target exists", where=str(target), remedy="name a new folder")
    if layout.kind_of(checkpoint) != "checkpoint":
        what = "is a run folder, and which of its checkpoints is meant is not said"
        raise UsageError(what, where=str(checkpoint), remedy=f"name one of {checkpoint}/{layout.CHECKPOINTS}")
    opened = opening.open_checkpoint(checkpoint, policy)
    if opened.kind == "nonfinite":
        raise VerificationFailed("is the state of a run that became non-finite", where=str(checkpoint))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{layout.TEMPORARY}{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        exported = _write(opened, temporary, target.name, signer, quiet)
        files.publish(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Exported(target, *exported)


def _write(
    opened: OpenedCheckpoint, folder: Path, name: str, signer: Signer, quiet: bool
) -> tuple[str, Layout, Mapping[str, Any], tuple[str, ...]]:
    config, tokenizer = (_small(opened, path) for path in (_CONFIG, _TOKENIZER))
    document = None if config is None else _object(config, str(opened.folder / _CONFIG))
    end, notes = _end(document, tokenizer)
    chosen = hugging_face.choose(document, end)
    contents = _small_files(chosen, config, tokenizer)
    weights, tensors = _weights(opened, chosen, folder / _WEIGHTS, quiet)
    for path, data in contents.items():
        (folder / path).write_bytes(data)
    entries = [FileEntry(path, len(data), _sha256(data)) for path, data in contents.items()]
    manifest = Manifest(tuple(sorted([*entries, weights], key=lambda each: each.path)), tuple(tensors))
    source = exports.source_of(opened.statement, opened.bundle_sha256)
    predicate = {
        "source": source,
        "layout": chosen.name,
        "reason": chosen.reason,
        "harness": harness.__version__,
        "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    identity = _seal(opened, manifest, folder, name, predicate, signer)
    return identity, chosen, source, notes


def _seal(
    opened: OpenedCheckpoint,
    manifest: Manifest,
    folder: Path,
    name: str,
    predicate: Mapping[str, Any],
    signer: Signer,
) -> str:
    """Manifest, statement, the checkpoint's own statement, and model.sig."""
    data = manifest.to_bytes()
    Manifest.parse(data, where=name)
    identity = checkpoint_id(data)
    covered = [(entry.path, entry.sha256) for entry in manifest.files] + [(layout.MANIFEST, identity)]
    bundle = files.read_limited(opened.folder / layout.CHECKPOINT_BUNDLE, envelope.LIMIT)
    if _sha256(bundle) != opened.bundle_sha256:
        raise VerificationFailed("changed while it was exported", where=str(opened.folder))
    ed25519, *p256 = public_keys(signer)
    statement = exports.export_statement(
        export_id=identity, dir_hash=dir_hash(covered), name=name, predicate=predicate
    )
    (folder / layout.PROVENANCE).mkdir()
    (folder / layout.MANIFEST).write_bytes(data)
    (folder / layout.EXPORT_BUNDLE).write_bytes(envelope.sign(statement, signer.ed25519, ed25519))
    (folder / layout.SOURCE_BUNDLE).write_bytes(bundle)
    if signer.p256 is not None:
        signature = model_signature.sign(covered, signer.p256, p256[0], name)
        (folder / layout.MODEL_SIGNATURE).write_bytes(signature)
    return identity


def _small(opened: OpenedCheckpoint, path: str) -> bytes | None:
    """A small payload file, compared with its digest; None when the checkpoint has none."""
    for entry in opened.manifest.files:
        if entry.path == path:
            data = files.read_limited(opened.folder / path, _SMALL)
            if _sha256(data) != entry.sha256:
                what = "the sha256 is not the one in MANIFEST.json"
                raise VerificationFailed(what, where=str(opened.folder / path))
            return data
    return None


def _small_files(chosen: Layout, config: bytes | None, tokenizer: bytes | None) -> dict[str, bytes]:
    contents = {}
    if config is not None:
        contents[_CONFIG] = config if chosen.name == "native" else _json(chosen.config)
    if tokenizer is not None:
        contents[_TOKENIZER] = tokenizer
        words = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": _END_OF_DOCUMENT}
        length = None if chosen.config is None else chosen.config.get("max_position_embeddings")
        contents[_TOKENIZER_CONFIG] = _json(words | ({"model_max_length": length} if length else {}))
    return contents


def _end(config: Mapping[str, Any] | None, tokenizer: bytes | None) -> tuple[int | None, tuple[str, ...]]:
    """The end-of-document token, and what a reader of the export should know."""
    if tokenizer is not None:
        added = json.loads(tokenizer).get("added_tokens", [])
        return next((each["id"] for each in added if each["content"] == _END_OF_DOCUMENT), None), ()
    if config is not None and config.get("vocab_size") == _BYTES_VOCABULARY:
        return 256, ("no tokenizer.json: tokens 0 to 255 are byte values, 256 is the end of a document",)
    return None, ("no tokenizer.json: the checkpoint has none",)


def _weights(
    opened: OpenedCheckpoint, chosen: Layout, path: Path, quiet: bool
) -> tuple[FileEntry, list[TensorEntry]]:
    """Stream the model's tensors into one file. Raises `VerificationFailed` for a byte that nobody signed."""
    sources = [each for each in opened.manifest.tensors if each.file.startswith("model")]
    pieces = {each: chosen.pieces(each) for each in sources}
    named = [(piece.name, source.dtype, piece.shape) for source in sources for piece in pieces[source]]
    header, spans = safetensors_header.build(named, {"format": "pt"})
    offset, digest = len(header), hashlib.sha256(header)
    tensors: list[TensorEntry] = []
    with open(path, "wb") as out, progress(len(sources), "tensors", "export", quiet=quiet) as bar:
        out.write(header)
        for source in sources:
            data = _tensor(opened, source)
            digest.update(data)
            out.write(data)
            start = 0
            for piece in pieces[source]:
                size = math.prod(piece.shape) * BITS[source.dtype] // 8
                part = memoryview(data)[start : start + size]
                place = (offset + start, offset + start + size)
                tensors.append(
                    TensorEntry(piece.name, path.name, source.dtype, piece.shape, *place, tensor_digest(part))
                )
                start += size
            offset += len(data)
            bar.advance(1)
    if [(span.start, span.end) for span in spans] != [(each.start, each.end) for each in tensors]:
        raise VerificationFailed("the export's header does not fit its tensors", where=str(path))
    ordered = sorted(tensors, key=lambda each: (each.start, each.name))
    return FileEntry(path.name, offset, digest.hexdigest()), ordered


def _tensor(opened: OpenedCheckpoint, source: TensorEntry) -> bytes:
    where = opened.folder / source.file
    with files.open_regular(where) as stream:
        stream.seek(source.start)
        data = stream.read(source.end - source.start)
    if tensor_digest(data) != source.digest:
        raise VerificationFailed(f"tensor `{source.name}` has other bytes than were signed", where=str(where))
    return data


def _object(data: bytes, where: str) -> dict[str, Any]:
    document = strict_json.loads(data, where=where)
    if not isinstance(document, dict):
        raise VerificationFailed("is no JSON object", where=where)
    return document


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
