"""MANIFEST.json: every payload file and every tensor of a checkpoint, with digests. Its sha256 is the id.

    {"format": "harness-manifest/1",
     "files":   [{"path", "size", "sha256"}, …],
     "tensors": [{"name", "file", "dtype", "shape", "start", "end", "digest"}, …]}

Files are sorted by path, tensors by (file, start, name); ``start`` and ``end`` are offsets in the file;
a tensor's digest is ``blake3:`` and hex, over its bytes as stored (`harness.format.tensor_digests`).
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from operator import itemgetter
from typing import Any, NamedTuple

from harness.errors import VerificationFailed
from harness.format import layout, strict_json
from harness.format.safetensors_header import BITS, check_name

FORMAT = "harness-manifest/1"

_is_sha256 = re.compile(r"[0-9a-f]{64}").fullmatch
_is_digest = re.compile(r"blake3:[0-9a-f]{64}").fullmatch
_PATH_LIMIT = 4096
_RESERVED = {layout.MANIFEST.casefold(), layout.MODEL_SIGNATURE, layout.PROVENANCE}
"""First parts of paths that no payload may have: the manifest itself, and what is signed around it."""


class FileEntry(NamedTuple):
    """A payload file."""

    path: str
    """Relative, with ``/``."""
    size: int
    sha256: str


class TensorEntry(NamedTuple):
    """A tensor of a safetensors payload file."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    digest: str


_FILE_FIELDS, _TENSOR_FIELDS = frozenset(FileEntry._fields), frozenset(TensorEntry._fields)
_in_file, _in_tensor = itemgetter(*FileEntry._fields), itemgetter(*TensorEntry._fields)


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint consists of."""

    files: tuple[FileEntry, ...]
    tensors: tuple[TensorEntry, ...]

    def to_bytes(self) -> bytes:
        """The bytes of MANIFEST.json."""
        return strict_json.dumps(
            {
                "format": FORMAT,
                "files": [entry._asdict() for entry in self.files],
                "tensors": [entry._asdict() for entry in self.tensors],
            }
        )

    @cached_property
    def digests(self) -> dict[str, str]:
        """Path → hex sha256 of every file."""
        return {entry.path: entry.sha256 for entry in self.files}

    @staticmethod
    def parse(data: bytes, *, where: str) -> Manifest:
        """The manifest of ``data``. Raises `VerificationFailed` for any departure from the format."""
        document = strict_json.loads(data, where=where)
        if not isinstance(document, dict) or set(document) != {"format", "files", "tensors"}:
            raise VerificationFailed("has other fields than format, files, tensors", where=where)
        if document["format"] != FORMAT:
            raise VerificationFailed(f"has the unknown format {document['format']!r}", where=where)
        files = tuple(_file(entry, where) for entry in _list(document["files"], "files", where))
        check_paths([entry.path for entry in files], where)
        sizes = {entry.path: entry.size for entry in files}
        tensors = tuple(
            _tensor(entry, sizes, where) for entry in _list(document["tensors"], "tensors", where)
        )
        keys = [(entry.file, entry.start, entry.name) for entry in tensors]
        if keys != sorted(keys):
            raise VerificationFailed("has tensors that are not sorted by file, start, name", where=where)
        if len({(entry.file, entry.name) for entry in tensors}) != len(tensors):
            raise VerificationFailed("names a tensor of a file twice", where=where)
        return Manifest(files, tensors)

    @staticmethod
    def stated(data: bytes, identity: str, directory: str, *, where: str) -> Manifest:
        """The manifest of ``data``, which a statement names by its id and by `dir_hash` of what it lists and
        itself. Raises `VerificationFailed` for any other, before it is parsed."""
        if checkpoint_id(data) != identity:
            raise VerificationFailed(
                f"is not the manifest that the statement is about ({identity[:12]}…)",
                where=where,
                remedy="the manifest was changed, or the statement belongs to another folder",
            )
        manifest = Manifest.parse(data, where=where)
        if dir_hash([*manifest.digests.items(), (layout.MANIFEST, identity)]) != directory:
            raise VerificationFailed("has another dirHash than the statement", where=where)
        return manifest


def checkpoint_id(manifest: bytes) -> str:
    """The id of a checkpoint: hex sha256 of its MANIFEST.json."""
    return hashlib.sha256(manifest).hexdigest()


def dir_hash(files: Iterable[tuple[str, str]]) -> str:
    """``h1:…`` over (path, hex sha256) pairs, as Go's golang.org/x/mod/sumdb/dirhash Hash1.

    Equal to ``sha256sum`` of the sorted output of ``sha256sum`` of every file, in base64.
    """
    lines = "".join(f"{digest}  {path}\n" for path, digest in sorted(files))
    return "h1:" + base64.b64encode(hashlib.sha256(lines.encode()).digest()).decode()


def state_digest(tensors: Iterable[TensorEntry]) -> str:
    """Hex digest of the model and optimizer tensors, independent of files and their layout.

    sha256 over the sorted lines ``name NUL dtype NUL shape NUL digest NEWLINE``, the shape joined by commas.
    """
    lines = sorted(  # as UTF-8 sorts: by code point
        f"{entry.name}\0{entry.dtype}\0{','.join(map(str, entry.shape))}\0{entry.digest}\n"
        for entry in tensors
        if entry.file.startswith(("model", "optimizer-"))
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def check_paths(paths: list[str], where: str) -> None:
    """Raise `VerificationFailed` unless ``paths`` are safe, sorted, and distinct on every file system."""
    for path in paths:
        _check_path(path, where)
    if any(before >= after for before, after in itertools.pairwise(paths)):
        raise VerificationFailed("has paths that are not sorted or not unique", where=where)
    folded = [path.casefold() for path in paths]
    if len(set(folded)) != len(folded):
        raise VerificationFailed("has paths that differ only by case", where=where)


def _check_path(path: str, where: str) -> None:
    wrong = _departure(path)
    if wrong is not None:
        raise VerificationFailed(wrong, where=where)


@lru_cache(1024)  # the checkpoints of a run have the same few
def _departure(path: str) -> str | None:
    parts = path.split("/")
    safe = (
        0 < len(path) <= _PATH_LIMIT
        and path.isprintable()
        and "\\" not in path
        and all(part not in ("", ".", "..") for part in parts)
        and unicodedata.normalize("NFC", path) == path
    )
    if not safe:
        return f"has the unsafe path {path!r}"
    return f"lists {path!r}, which is no payload" if parts[0].casefold() in _RESERVED else None


def _list(value: Any, name: str, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise VerificationFailed(f"has {name} that are no list", where=where)
    return value


def _natural(value: Any) -> bool:
    return type(value) is int and value >= 0


def _file(entry: Any, where: str) -> FileEntry:
    if not isinstance(entry, dict) or entry.keys() != _FILE_FIELDS:
        raise VerificationFailed("has a file entry with other fields than path, size, sha256", where=where)
    path, size, sha256 = _in_file(entry)
    if not isinstance(path, str) or not _natural(size):
        raise VerificationFailed(f"has a broken file entry {path!r}", where=where)
    if not isinstance(sha256, str) or not _is_sha256(sha256):
        raise VerificationFailed(f"has a broken sha256 for {path}", where=where)
    return FileEntry(path, size, sha256)


def _tensor(entry: Any, sizes: dict[str, int], where: str) -> TensorEntry:
    if not isinstance(entry, dict) or entry.keys() != _TENSOR_FIELDS:
        what = f"has a tensor entry with other fields than {sorted(_TENSOR_FIELDS)}"
        raise VerificationFailed(what, where=where)
    name, file, dtype, shape, start, end, digest = _in_tensor(entry)
    if not isinstance(name, str):
        raise VerificationFailed(f"has the tensor name {name!r}", where=where)
    check_name(name, where)
    if not isinstance(file, str) or file not in sizes:
        raise VerificationFailed(f"has the tensor `{name}` in a file that is not listed", where=where)
    if not isinstance(dtype, str) or dtype not in BITS:
        raise VerificationFailed(f"has the tensor `{name}` with an unknown dtype", where=where)
    if not isinstance(shape, list) or not all(map(_natural, shape)):
        raise VerificationFailed(f"has the tensor `{name}` with a broken shape", where=where)
    if not _natural(start) or not _natural(end) or not start <= end <= sizes[file]:
        raise VerificationFailed(f"has the tensor `{name}` outside its file", where=where)
    if not isinstance(digest, str) or not _is_digest(digest):
        raise VerificationFailed(f"has the tensor `{name}` with a broken digest", where=where)
    return TensorEntry(name, file, dtype, tuple(shape), start, end, digest)
