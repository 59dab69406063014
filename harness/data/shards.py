"""Token shards that the user made: ``data.kind: tokens``.

A shard is a safetensors file with the 1-D tensor ``tokens`` (U16 or U32) and, where known, ``bytes`` (U8, U16
or U32, as long): how many bytes of text each token stands for. Its metadata:

- ``vocabulary``: number of tokens, the same in all shards
- ``split``: ``train`` or ``held-out``; ``data.validation`` is not used
- ``tokenizer`` (optional): hex sha256 of the tokenizer.json. It must be the configured one's.

Shards of chats, which `harness prepare` makes, also have ``counted`` (U8): 1 where a token counts in the
loss; and in their metadata ``end``, the token of the end of a document.

A shard is mapped, never read whole into memory; the file that was digested is the one that is mapped
(`harness.data.tokens.Mapped`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from harness.data.corpus import files_digest
from harness.data.documents import matching_files
from harness.data.tokenizer import Encoder
from harness.data.tokens import Array, Counted, Mapped, TokenData
from harness.errors import ConfigError
from harness.format.files import open_regular
from harness.settings import Data

_DTYPES = {"U8": "<u1", "U16": "<u2", "U32": "<u4"}
_TOKEN_DTYPES = ("U16", "U32")


@dataclass(frozen=True)
class _Shard:
    tokens: Array
    bytes: Array | None
    vocabulary: int
    split: str
    tokenizer: str | None
    counted: Array | None
    end: int | None


def open_shards(data: Data, tokenizer: Encoder | None, base: Path) -> TokenData:
    """The tokens of the shards ``data.files``, relative to ``base``.

    Raises `ConfigError` when a shard is not one, shards disagree, a token is outside the vocabulary, or
    their tokenizer is not ``tokenizer``; `VerificationFailed` for what is no safetensors file.
    """
    if data.limit_bytes is not None:
        raise ConfigError("data.limit_bytes does not apply to token shards", remedy="list fewer shards")
    shards = {name: open_shard(path) for name, path in matching_files(data.files, base).items()}
    return tokens_of(shards, {name: shard.sha256 for name, shard in shards.items()}, tokenizer)


def open_shard(path: Path) -> Mapped:
    """The shard at ``path``, digested. Raises as `open_regular` does, and as `Mapped`."""
    return Mapped(open_regular(path), str(path))


def tokens_of(
    opened: Mapping[str, Mapped],
    files: Mapping[str, str],
    tokenizer: Encoder | None,
    template: bytes | None = None,
) -> TokenData:
    """The tokens of the shards ``opened``.

    ``files``: name → hex sha256 of everything in the corpus; ``template``: of chats.

    Raises as `open_shards` does.
    """
    shards = {name: _parsed(each, name) for name, each in opened.items()}
    vocabulary, digest = _agreed(shards)
    train = tuple(shard.tokens for shard in shards.values() if shard.split == "train")
    held_out = [shard for shard in shards.values() if shard.split == "held-out"]
    sizes = tuple(shard.bytes for shard in held_out if shard.bytes is not None)
    if digest is not None and (tokenizer is None or tokenizer.digest != digest):
        raise ConfigError(
            f"the shards were made with the tokenizer {digest[:12]}…",
            remedy="name it in tokenizer.kind and tokenizer.file",
        )
    return TokenData(
        train=train,
        held_out=tuple(shard.tokens for shard in held_out),
        held_out_bytes=sizes if len(sizes) == len(held_out) else None,
        vocabulary=vocabulary,
        corpus=files_digest(files),
        tokenizer=digest,
        tokenizer_file=tokenizer.file if tokenizer is not None and digest is not None else None,
        counts={
            "files": len(files),
            "tokens": sum(map(len, train)),
            "held_out_tokens": sum(len(shard.tokens) for shard in held_out),
        },
        files=files,
        counted=_counted(shards, template),
        held=tuple(opened.values()),
    )


def _counted(shards: Mapping[str, _Shard], template: bytes | None) -> Counted | None:
    """What counts in the loss. Raises `ConfigError` unless all shards say so and there is a template, or none
    does."""
    ends = {shard.end for shard in shards.values()}
    end = next(iter(ends))
    if len(ends) != 1 or (end is None) != (template is None):
        raise ConfigError(
            "some shards say which tokens count in the loss, and there is no template, or not all do",
            remedy="chats are read with data.kind=prepared",
        )
    if end is None or template is None:
        return None
    masks = {
        split: tuple(
            shard.counted for shard in shards.values() if shard.counted is not None and shard.split == split
        )
        for split in ("train", "held-out")
    }
    return Counted(masks["train"], masks["held-out"], end, template)


def digest_of(path: Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parsed(opened: Mapped, name: str) -> _Shard:
    header = opened.header()
    spans = {span.name: span for span in header.tensors}
    if "tokens" not in spans or set(spans) - {"tokens", "bytes", "counted"}:
        raise ConfigError(
            f"a shard holds `tokens` and perhaps `bytes` and `counted`, not {sorted(spans)}", where=name
        )
    arrays = {}
    for key, span in spans.items():
        allowed = _TOKEN_DTYPES if key == "tokens" else tuple(_DTYPES)
        if len(span.shape) != 1 or span.dtype not in allowed or not span.shape[0]:
            raise ConfigError(
                f"`{key}` is {span.dtype} {list(span.shape)}, not 1-D {'/'.join(allowed)}", where=name
            )
        arrays[key] = opened.array(_DTYPES[span.dtype], span.start, span.shape[0])
    for key in ("bytes", "counted"):
        if key in arrays and len(arrays[key]) != len(arrays["tokens"]):
            raise ConfigError(f"`{key}` and `tokens` differ in length", where=name)
    counted = arrays.get("counted")
    if counted is not None and int(counted.max()) > 1:
        raise ConfigError("`counted` holds more than 0 and 1", where=name)
    if "bytes" in arrays and not arrays["bytes"].any():
        raise ConfigError("`bytes` are all 0: leave the tensor out when they are not known", where=name)
    vocabulary = _number(header.metadata, "vocabulary", name)
    if int(arrays["tokens"].max()) >= vocabulary:
        raise ConfigError(
            f"token {int(arrays['tokens'].max())} is outside the vocabulary {vocabulary}", where=name
        )
    split = header.metadata.get("split")
    if split not in ("train", "held-out"):
        raise ConfigError(f"metadata `split` is {split!r}, not train or held-out", where=name)
    return _Shard(
        arrays["tokens"],
        arrays.get("bytes"),
        vocabulary,
        split,
        header.metadata.get("tokenizer"),
        counted,
        None if counted is None else _number(header.metadata, "end", name),
    )


def _number(metadata: Mapping[str, str], key: str, name: str) -> int:
    text = metadata.get(key, "")
    if not (text.isascii() and text.isdigit()):
        raise ConfigError(f"metadata `{key}` is {text!r}, not a number", where=name)
    return int(text)


def _agreed(shards: Mapping[str, _Shard]) -> tuple[int, str | None]:
    """The vocabulary and tokenizer of all shards."""
    seen = {(shard.vocabulary, shard.tokenizer) for shard in shards.values()}
    if len(seen) != 1:
        raise ConfigError(f"shards differ in vocabulary or tokenizer: {sorted(map(str, seen))}")
    if not any(shard.split == "train" for shard in shards.values()):
        raise ConfigError("no shard has the split train", remedy="set `split` in the shards' metadata")
    return seen.pop()
