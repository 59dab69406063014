"""Tokens of a corpus on disk, made once and mapped afterwards.

A cache entry is a folder named by its key, the sha256 of everything that its bytes depend on:

- ``train.bin``, ``held-out.bin``: little-endian uint16 (uint32 from 65,536 tokens up): an end of document,
  then every document followed by one
- ``held-out-bytes.bin``: uint32, how many bytes of text each held-out token stands for
- ``tokenizer.json``: the tokenizer, when it is not bytes
- ``tokens.json``: what is above, with sizes and sha256, and the digest of that

It appears by one rename, so any number of processes may make it at once; a lock only saves them the work.
Opening checks every digest: a damaged entry is an error, never used and never repaired in silence. The files
that were digested stay open, and are the ones that are mapped (`harness.data.tokens.Mapped`).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.data.corpus import Corpus, open_corpus
from harness.data.prepared import open_prepared
from harness.data.shards import open_shards
from harness.data.tokenizer import (
    BpeEncoder,
    ByteEncoder,
    Encoder,
    library_version,
    read_tokenizer,
    train_bpe,
)
from harness.data.tokens import Mapped, TokenData
from harness.errors import ConfigError, EnvironmentFault, HarnessError, VerificationFailed
from harness.format import strict_json
from harness.format.files import open_regular
from harness.settings import Data, Tokenizer
from harness.terminal import progress

_FORMAT = "harness-tokens/1"
_INDEX = "tokens.json"
_TOKENIZER = "tokenizer.json"
_REMEDY = "delete this folder; it is made again"
_ARRAYS = ("train", "held-out", "held-out-bytes")


def prepare(data: Data, tokenizer: Tokenizer | None, base: Path) -> TokenData:
    """The tokens of the corpus ``data``: from the cache, made now, or shards that were made before.

    Relative paths start at ``base``, the config's folder. Only a prepared corpus has no ``tokenizer``.

    Raises what `open_corpus` raises, `ConfigError` when all or none of the documents are held out,
    `VerificationFailed` when the cached tokens are damaged.
    """
    if tokenizer is None:
        return open_prepared(data, base)
    given = given_tokenizer(tokenizer, base)
    if data.kind == "tokens":
        return open_shards(data, given, base)
    corpus = open_corpus(data, base)
    key = _key(corpus, data, tokenizer, given)
    folder = _cache_folder(data.cache, base) / key
    if not folder.is_dir():
        with _locked(folder):
            if not folder.is_dir():
                _make(folder, corpus, data.validation, tokenizer, given)
    return _open(folder, corpus, tokenizer.kind)


def given_tokenizer(tokenizer: Tokenizer, base: Path) -> Encoder | None:
    """The tokenizer of the config, or None when one is to be trained."""
    if tokenizer.kind == "bytes":
        if tokenizer.file is not None:
            raise ConfigError("tokenizer.file is for tokenizer.kind bpe", remedy="set tokenizer.kind=bpe")
        return ByteEncoder()
    if tokenizer.file is None:
        return None
    path = base / tokenizer.file
    return BpeEncoder(read_tokenizer(path), str(path))


def _key(corpus: Corpus, data: Data, tokenizer: Tokenizer, given: Encoder | None) -> str:
    document = {
        "format": _FORMAT,
        "corpus": corpus.digest,
        "kind": data.kind,
        "field": data.field,
        "limit": data.limit_bytes,
        "validation": repr(data.validation),
        "tokenizer": given.digest if given else f"trained {tokenizer.vocabulary}",
        "library": library_version() if tokenizer.kind == "bpe" else None,
    }
    return hashlib.sha256(strict_json.dumps(document)).hexdigest()


def _cache_folder(configured: Path | None, base: Path) -> Path:
    if configured is not None:
        return base / configured
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "harness"


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock file beside ``folder`` while making it."""
    lock = folder.with_name(f"{folder.name}.lock")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise EnvironmentFault(
            f"cannot write the token cache ({error.strerror})",
            where=str(folder.parent),
            remedy="set data.cache",
        ) from error


def _make(folder: Path, corpus: Corpus, share: float, tokenizer: Tokenizer, given: Encoder | None) -> None:
    """Tokenize into a temporary folder and rename it; another process may have been first."""
    prefix = f".tmp-{folder.name}-"
    for left_over in folder.parent.glob(f"{prefix}*"):
        shutil.rmtree(left_over, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        encoder = given or _train(corpus, share, tokenizer.vocabulary)
        _write(temporary, corpus, share, encoder)
        try:
            temporary.rename(folder)
        except OSError:
            # Where locks do not work, another process was first: its entry has the same bytes.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _train(corpus: Corpus, share: float, vocabulary: int) -> Encoder:
    documents = (document for document in corpus.documents() if not document.held_out(share))
    return BpeEncoder(train_bpe(documents, vocabulary), "the trained tokenizer")


def _write(folder: Path, corpus: Corpus, share: float, encoder: Encoder) -> None:
    dtype = "<u2" if encoder.vocabulary <= 1 << 16 else "<u4"
    counts = dict.fromkeys(("documents", "held_out_documents", "bytes", "held_out_bytes"), 0)
    with contextlib.ExitStack() as stack:
        writers = {
            name: stack.enter_context(
                _Writer(folder / f"{name}.bin", "<u4" if name.endswith("bytes") else dtype)
            )
            for name in _ARRAYS
        }
        bar = stack.enter_context(progress(len(corpus.read), "files", "tokenizing"))
        writers["train"].add(np.array([encoder.end]))
        writers["held-out"].add(np.array([encoder.end]))
        writers["held-out-bytes"].add(np.array([0]))
        for document in corpus.documents(on_file=lambda: bar.advance(1)):
            tokens, sizes = encoder.encode(document)
            prefix = "held_out_" if document.held_out(share) else ""
            counts[f"{prefix}documents"] += 1
            counts[f"{prefix}bytes"] += len(document.text)
            if prefix:
                writers["held-out-bytes"].add(np.append(sizes, 0))
            writers["held-out" if prefix else "train"].add(np.append(tokens, encoder.end))
    _check_split(counts, share)
    if encoder.file is not None:
        (folder / _TOKENIZER).write_bytes(encoder.file)
    index = {
        "format": _FORMAT,
        "vocabulary": encoder.vocabulary,
        "tokenizer": encoder.digest,
        "arrays": {name: writer.entry() for name, writer in writers.items()},
        "counts": counts,
    }
    digest = hashlib.sha256(strict_json.dumps(index)).hexdigest()
    (folder / _INDEX).write_bytes(strict_json.dumps({"index": index, "sha256": digest}))


def _check_split(counts: Mapping[str, int], share: float) -> None:
    if not counts["documents"]:
        raise ConfigError("no document is left to train on", remedy="lower data.validation or add documents")
    if share and not counts["held_out_documents"]:
        raise ConfigError(
            f"data.validation {share} holds out none of {counts['documents']} documents",
            remedy="raise it, add documents, or set it to 0 for a run without evaluation",
        )


class _Writer(contextlib.AbstractContextManager["_Writer"]):
    """A growing array on disk, digested while written."""

    def __init__(self, path: Path, dtype: str) -> None:
        self._file = path.open("wb")
        self._dtype = np.dtype(dtype)
        self._sha256 = hashlib.sha256()
        self._count = 0

    def add(self, values: NDArray[Any]) -> None:
        data = values.astype(self._dtype).tobytes()
        self._sha256.update(data)
        self._file.write(data)
        self._count += len(values)

    def entry(self) -> dict[str, Any]:
        return {"dtype": self._dtype.str, "count": self._count, "sha256": self._sha256.hexdigest()}

    def __exit__(self, *_: object) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def _open(folder: Path, corpus: Corpus, kind: str) -> TokenData:
    index = _read_index(folder)
    arrays = index["arrays"]
    held = {name: _hold(folder / f"{name}.bin", arrays[name]["sha256"]) for name in _ARRAYS}
    train, held_out, sizes = (
        each.array(arrays[name]["dtype"], 0, arrays[name]["count"]) for name, each in held.items()
    )
    file = None if kind == "bytes" else _read_tokenizer_file(folder, index["tokenizer"])
    counts = {
        **index["counts"],
        "files": len(corpus.read),
        "tokens": len(train),
        "held_out_tokens": len(held_out),
    }
    return TokenData(
        train=(train,),
        held_out=(held_out,),
        held_out_bytes=(sizes,),
        vocabulary=index["vocabulary"],
        corpus=corpus.digest,
        tokenizer=index["tokenizer"],
        tokenizer_file=file,
        counts=counts,
        files=corpus.files,
        held=tuple(held.values()),
    )


def _read_index(folder: Path) -> Any:
    try:
        document = strict_json.loads((folder / _INDEX).read_bytes(), where=str(folder / _INDEX))
        index, digest = document["index"], document["sha256"]
        if hashlib.sha256(strict_json.dumps(index)).hexdigest() == digest and index["format"] == _FORMAT:
            return index
    except (OSError, KeyError, TypeError, VerificationFailed):
        pass
    raise VerificationFailed("cached tokens are damaged (tokens.json)", where=str(folder), remedy=_REMEDY)


def _read_tokenizer_file(folder: Path, digest: str) -> bytes:
    try:
        content = (folder / _TOKENIZER).read_bytes()
    except OSError:
        content = b""
    if hashlib.sha256(content).hexdigest() != digest:
        raise VerificationFailed(
            "cached tokens are damaged (tokenizer.json)", where=str(folder), remedy=_REMEDY
        )
    return content


def _hold(path: Path, expected: str) -> Mapped:
    """The file at ``path``, opened and digested once."""
    with contextlib.suppress(HarnessError):
        held = Mapped(open_regular(path), str(path))
        if held.sha256 == expected:
            return held
    raise VerificationFailed(
        f"cached tokens are damaged ({path.name})", where=str(path.parent), remedy=_REMEDY
    )
