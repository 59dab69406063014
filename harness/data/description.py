"""What a prepared corpus says of itself: the lists beside its shards, its manifest, its statement."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness import environment
from harness.audit.folders import prepared
from harness.data import parts
from harness.data.filters import Sieve
from harness.data.parts import SPLITS, Digests, Workplace
from harness.data.recipe import text_of
from harness.data.snapshot import Snapshot
from harness.data.tokenizer import library_version
from harness.format import moments, strict_json
from harness.format.layout import CHAT_TEMPLATE
from harness.format.manifest import FileEntry, Manifest
from harness.provenance import corpora


@dataclass(frozen=True)
class Description:
    """What is written around the shards."""

    place: Workplace
    snapshot: Snapshot
    count: int
    again: Sequence[Sequence[int]]
    tokenizer: bytes | None

    def write_lists(self, digests: Sequence[Digests]) -> int:
        """The snapshot, the recipe, the tokenizer and the sorted digests of each split; returns how many of
        these are in both."""
        folder, share = self.place.shards.parent, self.place.recipe.validation
        sources = {"format": "harness-sources/1", "files": {**self.snapshot.digests, **self.snapshot.code}}
        (folder / prepared.SOURCES).write_bytes(strict_json.dumps(sources))
        (folder / prepared.RECIPE).write_text(text_of(self.place.recipe))
        if self.tokenizer is not None:
            (folder / prepared.TOKENIZER).write_bytes(self.tokenizer)
        if self.place.template is not None:
            (folder / CHAT_TEMPLATE).write_bytes(self.place.template)
        kept = np.concatenate(
            [np.delete(each, list(again), axis=0) for each, again in zip(digests, self.again, strict=True)]
        )
        outside = parts.held_out(kept, share)
        (folder / "documents").mkdir()
        lists = {
            split: sorted(map(bytes, kept[outside == (split == "held_out")])) for split in prepared.DOCUMENTS
        }
        for split, path in prepared.DOCUMENTS.items():
            (folder / path).write_bytes(b"".join(lists[split]))
        return len(set(lists["train"]) & set(lists["held_out"]))

    def manifest(self) -> Manifest:
        """Every file of the folder; shards were digested when they were written."""
        folder = self.place.shards.parent
        known = {self.place.shard(split, number): facts for number, split, facts in self._shards()}
        return Manifest(tuple(_entries(folder, known)), ())

    def predicate(self, in_both: int) -> dict[str, Any]:
        """The ``corpus/v1`` predicate."""
        recipe, text = self.place.recipe, text_of(self.place.recipe)
        encoder = parts.encoder_of(self.tokenizer)
        trained = self.tokenizer is not None and recipe.tokenizer.file is None
        return {
            **self._chat(),
            "name": recipe.title,
            "recipe": {"sha256": hashlib.sha256(text.encode()).hexdigest(), "text": text},
            "source": {
                "kind": recipe.source.kind,
                "hub": recipe.source.hub,
                "files": len(self.snapshot.digests) + len(self.snapshot.code),
                "bytes": sum(self.snapshot.sizes.values()),
                "sha256": self.snapshot.digest,
            },
            "documents": self._documents(),
            "split": {
                "rule": corpora.SPLIT_RULE,
                "held_out_share": repr(recipe.validation),
                "train": self._split("train"),
                "held_out": self._split("held-out"),
                "in_both": in_both,
            },
            "tokenizer": {
                "kind": recipe.tokenizer.kind,
                "origin": "trained on the train split"
                if trained
                else "given"
                if self.tokenizer
                else "built in",
                "sha256": encoder.digest,
                "vocabulary": encoder.vocabulary,
                "library": f"tokenizers {library_version()}" if self.tokenizer else None,
            },
            "code": {**environment.code(), "source": next(iter(self.snapshot.code.values()), None)},
            "license": recipe.license,
            "url": recipe.url,
            "created": moments.now(),
        }

    def _chat(self) -> dict[str, Any]:
        """What is said of chats."""
        if self.place.template is None:
            return {}
        counted = {split.replace("-", "_"): self._split(split, "counted")["counted"] for split in SPLITS}
        digest = hashlib.sha256(self.place.template).hexdigest()
        return {"chat": {"template_sha256": digest, "counted": counted}}

    def _documents(self) -> dict[str, Any]:
        told = [_read(self.place.scanned(number)) for number in range(self.count)]
        dropped = {name: [0, 0] for name in Sieve(self.place.recipe.filters).names}
        for name, counts in ((name, counts) for each in told for name, counts in each["dropped"].items()):
            dropped[name] = [sum(both) for both in zip(dropped[name], counts, strict=True)]
        if self.place.recipe.filters.duplicates == "drop":
            sizes = [parts.sizes_of(self.place, number) for number in range(self.count)]
            repeated = [int(size[list(again)].sum()) for size, again in zip(sizes, self.again, strict=True)]
            dropped[corpora.SEEN_BEFORE] = [sum(map(len, self.again)), sum(repeated)]
        kept = [self._split(split) for split in SPLITS]
        return {
            "read": {unit: sum(each[unit] for each in told) for unit in ("documents", "bytes")},
            "kept": {unit: sum(each[unit] for each in kept) for unit in ("documents", "bytes")},
            "dropped": [
                {"filter": name, "count": {"documents": count, "bytes": size}}
                for name, (count, size) in dropped.items()
            ],
        }

    def _split(self, split: str, *units: str) -> dict[str, int]:
        mine = [facts for _, named, facts in self._shards() if named == split]
        sums = {unit: sum(each[unit] for each in mine) for unit in ("documents", "bytes", "tokens", *units)}
        return {**sums, "shards": len(mine)}

    def _shards(self) -> Iterator[tuple[int, str, Mapping[str, Any]]]:
        for number in range(self.count):
            for split, facts in _read(self.place.tokenized(number)).items():
                yield number, split, facts


def _entries(folder: Path, known: Mapping[Path, Mapping[str, Any]]) -> Iterator[FileEntry]:
    for path in sorted(each for each in folder.rglob("*") if each.is_file()):
        name = path.relative_to(folder).as_posix()
        facts = known.get(path)
        if facts is not None:
            yield FileEntry(name, facts["size"], facts["sha256"])
        else:
            data = path.read_bytes()
            yield FileEntry(name, len(data), hashlib.sha256(data).hexdigest())


def _read(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = strict_json.loads(path.read_bytes(), where=str(path))
    return document
