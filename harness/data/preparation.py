"""`harness prepare`: raw files to token shards, in parallel, resumable after a kill at any point.

1. every raw file is digested: the snapshot (``sources.json``)
2. parts of neighbouring files are read, formatted and filtered, each in a process (`harness.data.parts`)
3. documents whose bytes were there before, in the order of the files, are found over all parts
4. the tokenizer is trained on the train split, in a process, unless the recipe gives one or takes bytes
5. the parts are tokenized, each in a process, into one shard of each split
6. the folder gets its lists, MANIFEST.json, model.sig and statement, and appears by one rename

Everything before 6 lies in ``OUT.parts``, named by what it depends on: another recipe, another file or
another tokenizer library begins anew. The bytes of the folder, signatures apart, are a function of the
recipe, the files and the version of `tokenizers`; neither the number of processes nor a kill changes them.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from harness import environment
from harness.audit.folders import prepared
from harness.cores import process_cpu_count
from harness.data import chat, hub, parts
from harness.data.corpus import Files, WheelFiles, files_digest, files_of
from harness.data.filters import Sieve
from harness.data.parts import SPLITS, Digests, Part, Workplace
from harness.data.recipe import Recipe, text_of
from harness.data.tokenizer import BpeEncoder, library_version, read_tokenizer
from harness.errors import ConfigError, EnvironmentFault, ResumeRefused
from harness.format import files, moments, strict_json
from harness.format.layout import CHAT_TEMPLATE
from harness.format.manifest import FileEntry, Manifest
from harness.provenance import corpora, seal
from harness.provenance.signing.keys import Signer
from harness.terminal import progress
from harness.words import listed

FORMAT = "harness-corpus/1"
_SHOWN = 5


@dataclass(frozen=True)
class Prepared:
    """What `prepare` came to."""

    folder: Path
    corpus: str
    """The corpus id."""
    predicate: Mapping[str, Any]
    reused: int
    """Steps of parts that an earlier start had done."""
    steps: int
    """Steps of parts in all; 0 when the whole folder was there."""


@dataclass(frozen=True)
class _Snapshot:
    """The raw files, digested."""

    digests: Mapping[str, str]
    sizes: Mapping[str, int]
    code: Mapping[str, str]

    @property
    def digest(self) -> str:
        return files_digest({**self.digests, **self.code})


def prepare(recipe: Recipe, base: Path, signer: Signer, *, quiet: bool = False) -> Prepared:
    """Make the corpus of ``recipe``, or go on where a killed start was; ``base``: the recipe's folder.

    Raises `ConfigError` for what cannot be read or leaves nothing to train on, `ResumeRefused` when the
    folder holds another corpus, `VerificationFailed` for a wheel that differs from its RECORD.
    """
    base_of_recipe, base = base, hub.fetched(recipe.source, quiet=quiet) or base
    snapshot = _snapshot(recipe, base, quiet)
    template = None if recipe.format.chat is None else chat.read_template(base_of_recipe / recipe.format.chat)
    if recipe.out.exists():
        return _already(recipe, snapshot, template)
    scratch = recipe.out.with_name(f"{recipe.out.name}.parts")
    place = Workplace(recipe, base, scratch, scratch / "folder" / "shards", template)
    given = _given(recipe, base)
    with _held(scratch):
        _begin(place, _key(place, snapshot, given))
        return _made(place, snapshot, given, signer, quiet)


@contextlib.contextmanager
def _held(scratch: Path) -> Iterator[None]:
    """Hold the scratch folder until the process ends. Raises `EnvironmentFault` when another has it."""
    files.make_folder(scratch)
    descriptor = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise EnvironmentFault(
            "another process prepares this corpus", where=str(scratch), remedy="wait for it or stop it"
        ) from error
    finally:
        os.close(descriptor)


def _made(
    place: Workplace, snapshot: _Snapshot, given: bytes | None, signer: Signer, quiet: bool
) -> Prepared:
    """Steps 2 to 6."""
    recipe = place.recipe
    with _Processes(place, quiet) as pool:
        work = _divided(snapshot, recipe.shard_bytes)
        done = sum(
            place.scanned(part.number).exists() + place.tokenized(part.number).exists() for part in work
        )
        waiting = [(parts.scan, (place, part)) for part in work if not place.scanned(part.number).exists()]
        pool.run("reading", waiting)
        digests = [parts.digests_of(place, part.number) for part in work]
        again = _repeated(digests) if recipe.filters.duplicates == "drop" else [()] * len(work)
        _require_documents(recipe, digests)
        tokenizer = given if recipe.tokenizer.kind == "bytes" or given else _trained(place, again, pool)
        jobs = [
            (parts.tokenize, (place, part.number, again[part.number], tokenizer))
            for part in work
            if not place.tokenized(part.number).exists()
        ]
        pool.run("tokenizing", jobs)
    told = _Told(place, snapshot, len(work), again, tokenizer)
    predicate = told.predicate(in_both=told.write_lists(digests))
    corpus = seal.seal_corpus(place.shards.parent, told.manifest(), recipe.title, predicate, signer)
    files.publish(place.shards.parent, recipe.out)
    shutil.rmtree(place.scratch)
    return Prepared(recipe.out, corpus, predicate, done, 2 * len(work))


def _snapshot(recipe: Recipe, base: Path, quiet: bool) -> _Snapshot:
    """Digest the raw files, in threads: hashing holds no lock."""
    source, code = files_of(recipe.data, base)
    names = list(source.names())
    digests, sizes, left = {}, {}, recipe.source.limit_bytes
    with (
        progress(len(names), "files", "digesting", quiet=quiet) as bar,
        ThreadPoolExecutor(recipe.workers or process_cpu_count()) as pool,
    ):
        for name, (digest, size) in zip(names, pool.map(partial(_digested, source), names), strict=True):
            digests[name], sizes[name] = digest, size
            bar.advance(1)
            left = None if left is None else left - size
            if left is not None and left <= 0:
                pool.shutdown(cancel_futures=True)
                break
    if isinstance(source, WheelFiles):
        source.check(digests)
    return _Snapshot(digests, sizes, code)


def _digested(source: Files, name: str) -> tuple[str, int]:
    content = source.read(name)
    return hashlib.sha256(content).hexdigest(), len(content)


def _already(recipe: Recipe, snapshot: _Snapshot, template: bytes | None) -> Prepared:
    """The corpus that is there. Raises `ResumeRefused` when it is another one."""
    folder = recipe.out
    if not prepared.is_corpus(folder):
        raise ConfigError(
            "out is there and is no prepared corpus", where=str(folder), remedy="name a new folder"
        )
    statement = prepared.claimed(folder)
    before: dict[str, str] = strict_json.loads(
        (folder / prepared.SOURCES).read_bytes(), where=str(folder / prepared.SOURCES)
    )["files"]
    now = {**snapshot.digests, **snapshot.code}
    changed = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    if (folder / prepared.RECIPE).read_text() != text_of(recipe):
        changed.insert(0, "the recipe")
    if statement.predicate.get("chat", {}).get("template_sha256") != _sha256(template):
        changed.insert(0, "the template")
    if changed:
        raise ResumeRefused(
            f"the folder holds another corpus; what differs: {listed(changed, _SHOWN)}",
            where=str(folder),
            remedy="name another folder with out=…",
        )
    shutil.rmtree(folder.with_name(f"{folder.name}.parts"), ignore_errors=True)
    return Prepared(folder, statement.subject_id, statement.predicate, 0, 0)


def _given(recipe: Recipe, base: Path) -> bytes | None:
    if recipe.tokenizer.file is None:
        return None
    if recipe.tokenizer.kind == "bytes":
        raise ConfigError("tokenizer.file is for tokenizer.kind bpe", remedy="set tokenizer.kind=bpe")
    path = base / recipe.tokenizer.file
    content = read_tokenizer(path)
    BpeEncoder(content, str(path))
    return content


def _key(place: Workplace, snapshot: _Snapshot, given: bytes | None) -> bytes:
    recipe = place.recipe
    return strict_json.dumps(
        {
            "format": FORMAT,
            "recipe": text_of(recipe),
            "sources": snapshot.digest,
            "tokenizer": _sha256(given),
            "template": _sha256(place.template),
            "library": library_version() if recipe.tokenizer.kind == "bpe" else None,
        }
    )


def _sha256(content: bytes | None) -> str | None:
    return None if content is None else hashlib.sha256(content).hexdigest()


def _begin(place: Workplace, key: bytes) -> None:
    """An empty workplace for ``key``, or the one that is there for it."""
    path = place.scratch / "key.json"
    if not path.exists() or path.read_bytes() != key:
        _emptied(place.scratch, keep=())
    # Lists and statements of a start that was killed while it sealed are made again; shards stay.
    _emptied(place.shards.parent, keep=(place.shards,))
    files.make_folder(place.shards)
    files.write_durable(path, key)


def _emptied(folder: Path, keep: Sequence[Path]) -> None:
    for each in folder.iterdir() if folder.is_dir() else ():
        if each not in keep:
            shutil.rmtree(each) if each.is_dir() else each.unlink()


def _divided(snapshot: _Snapshot, size: int) -> list[Part]:
    """Neighbouring files, together at least ``size`` bytes."""
    found: list[Part] = []
    names: dict[str, str] = {}
    total = 0
    for name, digest in snapshot.digests.items():
        names[name] = digest
        total += snapshot.sizes[name]
        if total >= size:
            found.append(Part(len(found), names))
            names, total = {}, 0
    return [*found, Part(len(found), names)] if names else found


def _repeated(digests: Sequence[Digests]) -> list[tuple[int, ...]]:
    """For each part, the places of documents that were there before."""
    seen: set[bytes] = set()
    again = []
    for each in digests:
        places = []
        for place, digest in enumerate(map(bytes, each)):
            if digest in seen:
                places.append(place)
            seen.add(digest)
        again.append(tuple(places))
    return again


def _require_documents(recipe: Recipe, digests: Sequence[Digests]) -> None:
    outside = [int(parts.held_out(each, recipe.validation).sum()) for each in digests]
    total, held = sum(map(len, digests)), sum(outside)
    if total == held:
        raise ConfigError(
            f"of {total} documents that the filters left, none is to train on",
            remedy="loosen the filters, lower validation or add files",
        )
    if recipe.validation and not held:
        raise ConfigError(
            f"validation {recipe.validation} holds out none of {total} documents",
            remedy="raise it, add files, or set it to 0 for a corpus without evaluation",
        )


def _trained(place: Workplace, again: Sequence[Sequence[int]], pool: _Processes) -> bytes:
    """The tokenizer.json, trained once, in a process: `tokenizers` hears no Ctrl-C while it trains."""
    path = place.tokenizer
    if not path.exists():
        pool.run("training the tokenizer", [(parts.train_tokenizer, (place, again))])
    return path.read_bytes()


class _Processes:
    """Processes that end with this one, and when it is interrupted."""

    def __init__(self, place: Workplace, quiet: bool) -> None:
        self._quiet = quiet
        spawn = multiprocessing.get_context("spawn")
        self._stopped, self._stop = spawn.Pipe(duplex=False)
        self._pool = ProcessPoolExecutor(
            place.recipe.workers or process_cpu_count(),
            mp_context=spawn,
            initializer=parts.leave_with_parent,
            initargs=(self._stopped,),
        )

    def __enter__(self) -> _Processes:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and not issubclass(kind, Exception):
            self._stop.close()
        self._pool.shutdown(cancel_futures=True)
        self._stop.close()
        self._stopped.close()

    def run(self, label: str, jobs: Sequence[tuple[Callable[..., None], tuple[Any, ...]]]) -> None:
        """Do ``jobs`` in any order. Raises the first failure."""
        with progress(len(jobs), "parts", label, quiet=self._quiet) as bar:
            try:
                with _ctrl_c_held_back():
                    futures = [self._pool.submit(work, *words) for work, words in jobs]
                for future in as_completed(futures):
                    future.result()
                    bar.advance(1)
            except BrokenProcessPool as error:
                raise EnvironmentFault(
                    "a process that prepares data died",
                    remedy="look for the out-of-memory killer, or lower workers; the same command goes on",
                ) from error


@contextlib.contextmanager
def _ctrl_c_held_back() -> Iterator[None]:
    """Processes that are started in the block never get one; it reaches this process after the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@dataclass(frozen=True)
class _Told:
    """What is written around the shards."""

    place: Workplace
    snapshot: _Snapshot
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
        digest = _sha256(self.place.template)
        counted = {split.replace("-", "_"): self._split(split, "counted")["counted"] for split in SPLITS}
        return {} if digest is None else {"chat": {"template_sha256": digest, "counted": counted}}

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
