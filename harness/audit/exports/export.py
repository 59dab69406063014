"""A checkpoint as a Hugging Face folder, with its provenance carried along. Needs no torch.

- the checkpoint is opened under a policy, and every byte that is exported is compared with the signed digest
  while it is read: what was verified is what is written
- weights under the names of a Hugging Face architecture where it computes the same (`hugging_face`), else as
  they are, with the reason
- tokenizer and template of chats as `transformers` reads them (tokenizer.json, chat_template.jinja); both are
  the very files that the checkpoint was trained with, except that bytes get a tokenizer.json with their ids
- MANIFEST.json lists the exported files and tensors; ``provenance/export.sigstore.json`` is signed by whoever
  exports, and names the checkpoint; ``provenance/source.sigstore.json`` is the checkpoint's own statement,
  unchanged, and ``source-countersignature-N`` beside it what others have signed of it, which a policy's
  threshold counts; model.sig covers payload and MANIFEST.json
- the folder appears by one rename; the weights' bytes are a function of the checkpoint alone
- a merge is the same of several checkpoints, whose tensors a `Mix` makes one
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
from harness.audit.exports import hugging_face
from harness.audit.exports.hugging_face import Layout
from harness.audit.folders import file_set, opening
from harness.audit.folders.opening import OpenedCheckpoint
from harness.errors import UsageError, VerificationFailed
from harness.format import byte_tokenizer, files, layout, moments, safetensors_header, strict_json
from harness.format.byte_tokenizer import END_OF_DOCUMENT
from harness.format.manifest import FileEntry, Manifest, TensorEntry
from harness.format.safetensors_header import BITS
from harness.format.tensor_digests import tensor_digest
from harness.provenance import exports, later, seal
from harness.provenance.policy.rules import Policy
from harness.provenance.signing import envelope
from harness.provenance.signing.keys import Signer
from harness.terminal import progress

_WEIGHTS = "model.safetensors"
_CONFIG, _TOKENIZER, _TOKENIZER_CONFIG = "config.json", "tokenizer.json", "tokenizer_config.json"
_BYTES = (
    "tokenizer.json was made for the export: tokens 0 to 255 are byte values, 256 is the end of a document; "
    "it reads text, so no byte that is not UTF-8"
)
_CHATS_BEGIN = (
    "chats begin with the end of a document, which the template does not write: put eos_token first"
)


@dataclass(frozen=True)
class Mix:
    """How several checkpoints become one."""

    weights: tuple[str, ...]
    """One decimal a checkpoint, as they are signed."""
    combine: Callable[[str, Sequence[bytes]], bytes]
    """Of a safetensors dtype and a tensor's bytes in each checkpoint, the bytes of the result; raises
    `ValueError` for what it cannot make one."""


@dataclass(frozen=True)
class Exported:
    """What was written."""

    folder: Path
    export_id: str
    """Hex sha256 of its MANIFEST.json."""
    layout: Layout
    sources: tuple[Mapping[str, Any], ...]
    notes: tuple[str, ...]


def export(
    checkpoint: Path, target: Path, policy: Policy, signer: Signer, *, quiet: bool = False
) -> Exported:
    """Write the weights of ``checkpoint`` to the new folder ``target``.

    Raises `UsageError` when ``target`` exists or would lie in a signed folder, `VerificationFailed` or
    `EvidenceIncomplete` when the checkpoint does not verify; then nothing is left behind. Raises
    `EnvironmentFault` while another process writes the same target; what one that was killed has left of it
    is removed, and a note says so.
    """
    return merge([checkpoint], target, policy, signer, None, quiet=quiet)


def merge(
    checkpoints: Sequence[Path],
    target: Path,
    policy: Policy,
    signer: Signer,
    mix: Mix | None,
    *,
    quiet: bool = False,
) -> Exported:
    """The same of several checkpoints of one shape, made one by ``mix``.

    Raises `UsageError` besides when their tensors, config.json or tokenizer.json are not alike.
    """
    if target.exists() or target.is_symlink():
        raise UsageError("the target exists", where=str(target), remedy="name a new folder")
    layout.require_unsigned(target)
    opened = [_opened(checkpoint, policy) for checkpoint in checkpoints]
    _check_alike(opened)
    temporary = target.with_name(f"{layout.TEMPORARY}{target.name}")
    with files.workplace(temporary) as left:
        identity, chosen, sources, notes = _write(opened, temporary, target.name, signer, mix, quiet)
        files.publish(temporary, target)
    if left:
        notes = (*notes, f"{temporary.name}, left by an export that was cut off, was removed first")
    return Exported(target, identity, chosen, sources, notes)


def _opened(checkpoint: Path, policy: Policy) -> OpenedCheckpoint:
    if layout.kind_of(checkpoint) != "checkpoint":
        what = "is a run folder, and which of its checkpoints is meant is not said"
        raise UsageError(what, where=str(checkpoint), remedy=f"name one of {checkpoint}/{layout.CHECKPOINTS}")
    opened = opening.open_checkpoint(checkpoint, policy)
    if opened.kind == "nonfinite":
        raise VerificationFailed("is the state of a run that became non-finite", where=str(checkpoint))
    return opened


def _check_alike(opened: Sequence[OpenedCheckpoint]) -> None:
    """Weights of other shapes, or that read other tokens, cannot be made one."""
    first = opened[0]
    for other in opened[1:]:
        shapes = [{(each.name, each.dtype, each.shape) for each in _model(side)} for side in (first, other)]
        if shapes[0] != shapes[1]:
            named = sorted(name for name, *_ in shapes[0] ^ shapes[1])
            what = f"its tensors are not those of {first.folder}: `{named[0]}` is of another shape"
            raise UsageError(what, where=str(other.folder), remedy="merge checkpoints of one model")
        for path in (_CONFIG, _TOKENIZER):
            if _small(first, path) != _small(other, path):
                what = f"its {path} is not that of {first.folder}"
                raise UsageError(what, where=str(other.folder), remedy="merge checkpoints of one model")


def _model(opened: OpenedCheckpoint) -> list[TensorEntry]:
    return [each for each in opened.manifest.tensors if each.file.startswith("model")]


def _write(
    several: Sequence[OpenedCheckpoint], folder: Path, name: str, signer: Signer, mix: Mix | None, quiet: bool
) -> tuple[str, Layout, tuple[Mapping[str, Any], ...], tuple[str, ...]]:
    opened = several[0]
    config, tokenizer = (_small(opened, path) for path in (_CONFIG, _TOKENIZER))
    template = _template(several)
    document = None if config is None else _object(config, str(opened.folder / _CONFIG))
    end, notes = _end(tokenizer)
    if tokenizer is None and all(map(_reads_bytes, several)):
        tokenizer, end, notes = byte_tokenizer.tokenizer_json(), byte_tokenizer.END, (_BYTES,)
    chosen = hugging_face.choose(document, end)
    contents = _small_files(chosen, config, tokenizer)
    if template is not None:
        contents[layout.CHAT_TEMPLATE] = template
        notes = (*notes, _CHATS_BEGIN)
    weights, tensors = _weights(several, mix, chosen, folder / _WEIGHTS, quiet)
    for path, data in contents.items():
        (folder / path).write_bytes(data)
    entries = [FileEntry(path, len(data), _sha256(data)) for path, data in contents.items()]
    manifest = Manifest(tuple(sorted([*entries, weights], key=lambda each: each.path)), tuple(tensors))
    sources = tuple(exports.source_of(each.statement, each.bundle_sha256) for each in several)
    merged = (
        {}
        if mix is None
        else {"merge": {"method": exports.AVERAGE, "weights": list(mix.weights), "others": list(sources[1:])}}
    )
    predicate = {
        **merged,
        "source": sources[0],
        "layout": chosen.name,
        "reason": chosen.reason,
        "harness": harness.__version__,
        "created": moments.now(),
    }
    identity = _seal(several, manifest, folder, name, predicate, signer)
    return identity, chosen, sources, notes


def _seal(
    several: Sequence[OpenedCheckpoint],
    manifest: Manifest,
    folder: Path,
    name: str,
    predicate: Mapping[str, Any],
    signer: Signer,
) -> str:
    """Manifest, statement, model.sig, and the checkpoints' own statements with whoever has countersigned."""
    bundles: dict[str, bytes] = {}
    for number, opened in enumerate(several):
        bundles[layout.source_bundle(number)] = _bundle(
            opened, layout.CHECKPOINT_BUNDLE, opened.bundle_sha256
        )
        for each, digest in opened.later.items():
            if later.kind_of(each) == later.COUNTERSIGNATURE:
                path = layout.source_countersignature(number, each)
                bundles[path] = _bundle(opened, later.path_of(each), digest)
    identity = seal.seal_export(folder, manifest, name, predicate, signer)
    for path, bundle in bundles.items():
        (folder / path).write_bytes(bundle)
    return identity


def _bundle(opened: OpenedCheckpoint, path: str, digest: str) -> bytes:
    """A statement of ``opened``. Raises `VerificationFailed` for another than was verified."""
    data = files.read_limited(opened.folder / path, envelope.LIMIT)
    if _sha256(data) != digest:
        raise VerificationFailed("changed while it was exported", where=str(opened.folder / path))
    return data


def _small(opened: OpenedCheckpoint, path: str) -> bytes | None:
    """A small payload file, compared with its digest; None when the checkpoint has none."""
    for entry in opened.manifest.files:
        if entry.path == path:
            return file_set.read_listed(opened.folder, entry)
    return None


def _template(several: Sequence[OpenedCheckpoint]) -> bytes | None:
    """The template of chats, from those that have one: a base model that is merged in has none.

    Raises `VerificationFailed` for another than the statement names, `UsageError` for two different ones.
    """
    found: tuple[bytes, OpenedCheckpoint] | None = None
    for opened in several:
        template = _small(opened, layout.CHAT_TEMPLATE)
        stated = opened.statement.predicate["data"].get("template_sha256")
        if stated is not None and (template is None or _sha256(template) != stated):
            what = "is not the template that the checkpoint's statement names"
            raise VerificationFailed(what, where=str(opened.folder / layout.CHAT_TEMPLATE))
        if template is None:
            continue
        if found is not None and found[0] != template:
            what = f"its {layout.CHAT_TEMPLATE} is not that of {found[1].folder}"
            raise UsageError(what, where=str(opened.folder), remedy="merge models of one template")
        found = (template, opened)
    return None if found is None else found[0]


def _small_files(chosen: Layout, config: bytes | None, tokenizer: bytes | None) -> dict[str, bytes]:
    contents = {}
    if config is not None:
        contents[_CONFIG] = config if chosen.name == "native" else _json(chosen.config)
    if tokenizer is not None:
        contents[_TOKENIZER] = tokenizer
        # One token begins, ends and fills a row of chats; the text of tokens is theirs, byte for byte.
        words: dict[str, Any] = {f"{use}_token": END_OF_DOCUMENT for use in ("bos", "eos", "pad")}
        words |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        length = None if chosen.config is None else chosen.config.get("max_position_embeddings")
        contents[_TOKENIZER_CONFIG] = _json(words | ({"model_max_length": length} if length else {}))
    return contents


def _end(tokenizer: bytes | None) -> tuple[int | None, tuple[str, ...]]:
    """The end-of-document token, and what a reader of the export should know."""
    if tokenizer is None:
        return None, ("no tokenizer.json: the checkpoint has none",)
    added = json.loads(tokenizer).get("added_tokens", [])
    return next((each["id"] for each in added if each["content"] == END_OF_DOCUMENT), None), ()


def _reads_bytes(opened: OpenedCheckpoint) -> bool:
    """Whether its statement names the tokenizer of bytes, which needs no file."""
    return bool(opened.statement.predicate["data"]["tokenizer_sha256"] == byte_tokenizer.DIGEST)


def _weights(
    several: Sequence[OpenedCheckpoint], mix: Mix | None, chosen: Layout, path: Path, quiet: bool
) -> tuple[FileEntry, list[TensorEntry]]:
    """Stream the model's tensors into one file. Raises `VerificationFailed` for a byte that nobody signed."""
    sources = _model(several[0])
    entries = [{each.name: each for each in _model(opened)} for opened in several]
    pieces = {each: chosen.pieces(each) for each in sources}
    named = [(piece.name, source.dtype, piece.shape) for source in sources for piece in pieces[source]]
    header, spans = safetensors_header.build(named, {"format": "pt"})
    offset, digest = len(header), hashlib.sha256(header)
    tensors: list[TensorEntry] = []
    with open(path, "wb") as out, progress(len(sources), "tensors", "export", quiet=quiet) as bar:
        out.write(header)
        for source in sources:
            read = [
                _tensor(opened, known[source.name]) for opened, known in zip(several, entries, strict=True)
            ]
            data = read[0] if mix is None else _mixed(mix, source, read)
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


def _mixed(mix: Mix, source: TensorEntry, read: Sequence[bytes]) -> bytes:
    try:
        return mix.combine(source.dtype, read)
    except ValueError as error:
        where = f"tensor `{source.name}`"
        remedy = "merge checkpoints of one model and dtype"
        raise UsageError(f"cannot be merged: {error}", where=where, remedy=remedy) from error


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
