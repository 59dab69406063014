"""`harness prepare`: raw files to token shards, in parallel, resumable after a kill at any point.

1. every raw file is digested: the snapshot (`harness.data.snapshot`)
2. parts of neighbouring files are read, formatted and filtered, each in a process (`harness.data.parts`)
3. documents whose bytes were there before, in the order of the files, are found over all parts
4. the tokenizer is trained on the train split, in a process, unless the recipe gives one or takes bytes
5. the parts are tokenized, each in a process, into one shard of each split
6. the folder gets its lists, MANIFEST.json, model.sig and statement (`harness.data.description`), and appears
   by one rename

Everything before 6 lies in ``OUT.parts``, named by what it depends on: another recipe, another file or
another tokenizer library begins anew. The bytes of the folder, signatures apart, are a function of the
recipe, the files and the version of `tokenizers`; neither the number of processes nor a kill changes them.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.audit.folders import prepared
from harness.data import chat, hub, parts
from harness.data.description import Description
from harness.data.parts import Digests, Part, Workplace
from harness.data.processes import Processes
from harness.data.recipe import Recipe, text_of
from harness.data.snapshot import Snapshot, take
from harness.data.tokenizer import BpeEncoder, library_version, read_tokenizer
from harness.errors import ConfigError, EnvironmentFault, ResumeRefused
from harness.format import files, strict_json
from harness.provenance import seal
from harness.provenance.signing.keys import Signer
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


def prepare(recipe: Recipe, base: Path, signer: Signer, *, quiet: bool = False) -> Prepared:
    """Make the corpus of ``recipe``, or go on where a killed start was; ``base``: the recipe's folder.

    Raises `ConfigError` for what cannot be read or leaves nothing to train on, `ResumeRefused` when the
    folder holds another corpus, `VerificationFailed` for a wheel that differs from its RECORD.
    """
    base_of_recipe, base = base, hub.fetched(recipe.source, quiet=quiet) or base
    snapshot = take(recipe, base, quiet)
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


def _made(place: Workplace, snapshot: Snapshot, given: bytes | None, signer: Signer, quiet: bool) -> Prepared:
    """Steps 2 to 6."""
    recipe = place.recipe
    with Processes(place, quiet) as pool:
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
    told = Description(place, snapshot, len(work), again, tokenizer)
    predicate = told.predicate(in_both=told.write_lists(digests))
    corpus = seal.seal_corpus(place.shards.parent, told.manifest(), recipe.title, predicate, signer)
    files.publish(place.shards.parent, recipe.out)
    shutil.rmtree(place.scratch)
    return Prepared(recipe.out, corpus, predicate, done, 2 * len(work))


def _already(recipe: Recipe, snapshot: Snapshot, template: bytes | None) -> Prepared:
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


def _key(place: Workplace, snapshot: Snapshot, given: bytes | None) -> bytes:
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


def _divided(snapshot: Snapshot, size: int) -> list[Part]:
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


def _trained(place: Workplace, again: Sequence[Sequence[int]], pool: Processes) -> bytes:
    """The tokenizer.json, trained once, in a process: `tokenizers` hears no Ctrl-C while it trains."""
    path = place.tokenizer
    if not path.exists():
        pool.run("training the tokenizer", [(parts.train_tokenizer, (place, again))])
    return path.read_bytes()
