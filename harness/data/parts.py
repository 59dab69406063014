"""The work of `harness prepare` on a part of the raw files, in a process: read, filter, tokenize.

A part is a few neighbouring files. Each of the two steps writes under temporary names, then renames, last a
JSON file that says what it came to: that name exists exactly when the step is done, so a kill at any point
costs one step of one part, and what is there needs no second look.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.audit.folders import prepared
from harness.data import chat
from harness.data.corpus import files_of
from harness.data.documents import Document
from harness.data.filters import Sieve, formatted
from harness.data.recipe import Recipe
from harness.data.tokenizer import BpeEncoder, ByteEncoder, Encoder, Tokens, train_bpe
from harness.errors import VerificationFailed
from harness.format import files, safetensors_header, strict_json

Digests = NDArray[np.uint8]
"""(documents, 32): the sha256 of each text."""
SPLITS = ("train", "held-out")


@dataclass(frozen=True)
class Workplace:
    """What every process knows."""

    recipe: Recipe
    base: Path
    """Folder that `source.files` are relative to."""
    scratch: Path
    """Where the text that was kept waits to be tokenized."""
    shards: Path
    """Where shards go."""
    template: bytes | None = None
    """The template of chats."""

    def scanned(self, number: int) -> Path:
        """The name that says that a part was read."""
        return self.scratch / f"read-{number:05d}.json"

    def tokenized(self, number: int) -> Path:
        """The name that says that a part was tokenized."""
        return self.scratch / f"tokens-{number:05d}.json"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer that was trained."""
        return self.scratch / prepared.TOKENIZER

    def shard(self, split: str, number: int) -> Path:
        """The shard of a part, if it has documents of that split."""
        return self.shards / f"{split}-{number:05d}.safetensors"


@dataclass(frozen=True)
class Part:
    """Neighbouring raw files."""

    number: int
    digests: Mapping[str, str]
    """Name to hex sha256, in the order of use."""


def leave_with_parent(stopped: connection.Connection) -> None:
    """End this process when the one that started it is gone, since a kill -9 of that tells nobody, or closes
    the other end of ``stopped``."""
    parent = parent_process()
    if parent is None:
        return

    def watch() -> None:
        connection.wait([parent.sentinel, stopped])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def scan(place: Workplace, part: Part) -> None:
    """Read, format and filter the documents of ``part``; what stays waits in the scratch folder.

    Raises `VerificationFailed` when a file is not the one that was digested.
    """
    source, _ = files_of(place.recipe.data, place.base)
    sieve = Sieve(place.recipe.filters)
    texts, dropped, dropped_bytes = [], Counter[str](), Counter[str]()
    read = read_bytes = 0
    for name, expected in part.digests.items():
        content = source.read(name)
        if hashlib.sha256(content).hexdigest() != expected:
            raise VerificationFailed("file changed while it was prepared", where=name, remedy="start again")
        for document in source.documents(name, content):
            read, read_bytes = read + 1, read_bytes + len(document.text)
            text = formatted(document, place.recipe.format)
            reason = sieve.reason(text)
            if reason is None:
                texts.append(text)
            else:
                dropped[reason] += 1
                dropped_bytes[reason] += len(text)
    digests = np.frombuffer(b"".join(hashlib.sha256(text).digest() for text in texts), np.uint8)
    stem = place.scratch / f"read-{part.number:05d}"
    files.write_durable(stem.with_suffix(".text"), b"".join(texts))
    files.write_durable(stem.with_suffix(".sizes"), np.array([*map(len, texts)], "<u8").tobytes())
    files.write_durable(stem.with_suffix(".digests"), digests.tobytes())
    told = {
        "documents": read,
        "bytes": read_bytes,
        "dropped": {each: [dropped[each], dropped_bytes[each]] for each in sorted(dropped)},
    }
    files.write_durable(place.scanned(part.number), strict_json.dumps(told))


def digests_of(place: Workplace, number: int) -> Digests:
    """The digests of what `scan` kept."""
    data = (place.scratch / f"read-{number:05d}.digests").read_bytes()
    return np.frombuffer(data, np.uint8).reshape(-1, hashlib.sha256().digest_size)


def sizes_of(place: Workplace, number: int) -> NDArray[np.uint64]:
    """Bytes of each document that `scan` kept."""
    return np.fromfile(place.scratch / f"read-{number:05d}.sizes", "<u8")


def held_out(digests: Digests, share: float) -> NDArray[np.bool_]:
    """Which documents are held out; the rule of `harness.provenance.corpora.SPLIT_RULE`."""
    first = np.ascontiguousarray(digests[:, :8]).view(">u8").reshape(-1)
    # Rounded up, so that whole numbers compare as with the exact product.
    return first < np.uint64(math.ceil(share * 2**64))


def documents_of(place: Workplace, number: int, again: Sequence[int], split: str) -> Iterator[Document]:
    """The kept documents of a part and ``split``, without those at the places ``again``, seen before."""
    with open(place.scratch / f"read-{number:05d}.text", "rb") as stream:
        outside = held_out(digests_of(place, number), place.recipe.validation)
        repeated = frozenset(again)
        for place_in_part, size in enumerate(sizes_of(place, number)):
            text = stream.read(int(size))
            if place_in_part not in repeated and SPLITS[int(outside[place_in_part])] == split:
                yield Document(f"part {number}, document {place_in_part}", text)


def train_tokenizer(place: Workplace, again: Sequence[Sequence[int]]) -> None:
    """Train the tokenizer on the train split; ``again`` holds, for each part, the places of documents that
    were there before. Raises as `train_bpe`."""
    documents = (
        document
        for number, repeated in enumerate(again)
        for document in documents_of(place, number, repeated, SPLITS[0])
    )
    files.write_durable(place.tokenizer, train_bpe(documents, place.recipe.tokenizer.vocabulary))


def tokenize(place: Workplace, number: int, again: Sequence[int], tokenizer: bytes | None) -> None:
    """Write the shards of a part: an end of document, then each document followed by one."""
    encoder = encoder_of(tokenizer)
    encode = _Chats(place.template, encoder) if place.template is not None else _Texts(encoder)
    told: dict[str, Any] = {}
    for split in SPLITS:
        made = [encode.begin()]
        count = size = 0
        for document in documents_of(place, number, again, split):
            made.append(encode(document))
            count, size = count + 1, size + len(document.text)
        if count:
            columns = [np.concatenate(each) for each in zip(*made, strict=True)]
            data = _shard(columns, encoder, split)
            temporary = place.scratch / f".tmp-{split}-{number:05d}"
            files.write_durable(place.shard(split, number), data, temporary=temporary)
            told[split] = {
                "documents": count,
                "bytes": size,
                "tokens": len(columns[0]),
                "counted": int(columns[2].sum()) if len(columns) > 2 else 0,
                "size": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
            }
    files.write_durable(place.tokenized(number), strict_json.dumps(told))


def encoder_of(tokenizer: bytes | None) -> Encoder:
    """The encoder of a tokenizer.json; bytes without one."""
    return ByteEncoder() if tokenizer is None else BpeEncoder(tokenizer, "tokenizer.json")


class _Texts:
    """Documents as text: tokens, and the bytes that each stands for; then the end of document."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def begin(self) -> list[Tokens]:
        """What a shard begins with."""
        return [np.array([self._encoder.end], np.uint32), np.zeros(1, np.uint32)]

    def __call__(self, document: Document) -> list[Tokens]:
        tokens, sizes = self._encoder.encode(document)
        return [np.append(tokens, np.uint32(self._encoder.end)), np.append(sizes, np.uint32(0))]


class _Chats:
    """Documents as chats: a third column is 1 where a token counts in the loss.

    Each stretch is tokenized by itself, so that no token lies on both sides of a mark, and the tokens of a
    prompt do not depend on the answer. The end of document counts when the last message is the assistant's.
    """

    def __init__(self, template: bytes, encoder: Encoder) -> None:
        self._template = chat.Template(template, "the template")
        self._encoder = encoder

    def begin(self) -> list[Tokens]:
        """What a shard begins with; nothing predicts it."""
        return [np.array([self._encoder.end], np.uint32), np.zeros(1, np.uint32), np.zeros(1, np.uint32)]

    def __call__(self, document: Document) -> list[Tokens]:
        messages = chat.parse(document.text, document.name)
        made: list[list[Tokens]] = []
        for each in chat.joined(self._template.stretches(messages, document.name)):
            tokens, sizes = self._encoder.encode(Document(document.name, each.text.encode()))
            made.append([tokens, sizes, np.full_like(tokens, each.counts)])
        last = np.array([messages[-1]["role"] == "assistant"], np.uint32)
        made.append([np.array([self._encoder.end], np.uint32), np.zeros(1, np.uint32), last])
        return [np.concatenate(column) for column in zip(*made, strict=True)]


def _shard(columns: Sequence[Tokens], encoder: Encoder, split: str) -> bytes:
    """A safetensors file as `harness.data.shards` reads it: tokens, bytes of held-out text, what counts."""
    tokens, sizes, *counted = columns
    dtype, name = ("<u2", "U16") if encoder.vocabulary <= 1 << 16 else ("<u4", "U32")
    metadata = {"vocabulary": str(encoder.vocabulary), "split": split, "tokenizer": encoder.digest}
    tensors, data = [("tokens", name, [len(tokens)])], [tokens.astype(dtype).tobytes()]
    if split == "held-out":  # bits per byte are of held-out text
        tensors.append(("bytes", "U32", [len(sizes)]))
        data.append(sizes.astype("<u4").tobytes())
    for each in counted:
        metadata["end"] = str(encoder.end)
        tensors.append(("counted", "U8", [len(each)]))
        data.append(each.astype("<u1").tobytes())
    header, _ = safetensors_header.build(tensors, metadata)
    return b"".join((header, *data))
