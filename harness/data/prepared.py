"""A corpus that `harness prepare` made, opened for training: ``data.kind: prepared``.

- the statement must be about the folder's MANIFEST.json, and every file must have the digest that this lists:
  a shard or a tokenizer that changed is named and refused
- a shard is opened once: the file that was digested is the one that is trained on
- the corpus' digest in the run's statements is the corpus id, so lineage leads from checkpoints to the folder
- who signed the corpus is not asked here: `harness verify FOLDER --key …` tells
"""

from __future__ import annotations

from pathlib import Path

from harness.audit.folders import file_set, prepared, sealed
from harness.data.documents import prepared_folder
from harness.data.shards import digest_of, open_shard, tokens_of
from harness.data.tokenizer import BpeEncoder, ByteEncoder, Encoder
from harness.data.tokens import Mapped, TokenData
from harness.errors import ConfigError, EvidenceIncomplete, VerificationFailed
from harness.format.layout import CHAT_TEMPLATE
from harness.settings import PREPARED, Data
from harness.words import listed

_SHARDS = "shards/"
_NAMED = 5


def open_prepared(data: Data, base: Path) -> TokenData:
    """The tokens of the folder that ``data.files`` names, relative to ``base``.

    Raises `ConfigError` when there is no such corpus, `VerificationFailed`, naming them, for changed files,
    `EnvironmentFault` for a shard that cannot be read.
    """
    if data.kind != PREPARED:
        raise ConfigError(
            f"data.kind {data.kind} needs the section tokenizer", remedy="remove tokenizer: null"
        )
    if data.limit_bytes is not None:
        raise ConfigError(
            "data.limit_bytes does not apply to a prepared corpus", remedy="prepare a smaller one"
        )
    folder = prepared_folder(data, base)
    statement = prepared.claimed(folder)
    manifest = sealed.manifest(folder, statement)
    small = {entry.path: entry for entry in manifest.files if not entry.path.startswith(_SHARDS)}
    digests = manifest.digests
    shards = _opened(folder, digests)
    encoder: Encoder = ByteEncoder()
    if prepared.TOKENIZER in small:
        content = file_set.read_listed(folder, small[prepared.TOKENIZER])
        encoder = BpeEncoder(content, str(folder / prepared.TOKENIZER))
    chat = small.get(CHAT_TEMPLATE)
    template = None if chat is None else file_set.read_listed(folder, chat)
    found = tokens_of(shards, digests, encoder, template)
    split = statement.predicate["split"]
    counts = {
        "documents": split["train"]["documents"],
        "held_out_documents": split["held_out"]["documents"],
        "bytes": split["train"]["bytes"],
        "held_out_bytes": split["held_out"]["bytes"],
        "files": statement.predicate["source"]["files"],
        "tokens": found.counts["tokens"],
        "held_out_tokens": found.counts["held_out_tokens"],
    }
    return TokenData(
        train=found.train,
        held_out=found.held_out,
        held_out_bytes=found.held_out_bytes,
        vocabulary=found.vocabulary,
        corpus=statement.subject_id,
        tokenizer=encoder.digest,
        tokenizer_file=encoder.file,
        counts=counts,
        files=digests,
        counted=found.counted,
        held=found.held,
    )


def _opened(folder: Path, digests: dict[str, str]) -> dict[str, Mapped]:
    """The shards, open, once every listed file has its digest."""
    shards: dict[str, Mapped] = {}
    changed = []
    for path, expected in digests.items():
        if path.startswith(_SHARDS):
            shard = _shard(folder / path)
            if shard is not None and shard.sha256 == expected:
                shards[path] = shard
                continue
        elif _digest(folder / path) == expected:
            continue
        changed.append(path)
    if changed:
        raise VerificationFailed(
            f"{len(changed)} files of the corpus changed since it was prepared",
            where=listed([str(folder / path) for path in changed], _NAMED),
            remedy="prepare it again into another folder, or get the files back",
        )
    return shards


def _shard(path: Path) -> Mapped | None:
    """None when it is not there."""
    try:
        return open_shard(path)
    except EvidenceIncomplete:
        return None


def _digest(path: Path) -> str:
    try:
        return digest_of(path)
    except OSError:
        return "cannot be read"
