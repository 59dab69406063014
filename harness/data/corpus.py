"""Documents of a run: what they are, that they are what they should be, and which are held out.

A corpus is a list of files. Its digest is the sha256 over the sorted lines ``name\\0sha256-of-bytes\\n``, so
a resume can name each file that changed, came or went. Rules:

- Files are taken in sorted order; a missing file, or a pattern that matches none, is an error.
- A file of an installed wheel must match the digest in the wheel's RECORD; all that do not are named.
- With ``limit_bytes`` documents are used in order until so many bytes are reached, the last one cut at a
  character; files beyond are not read and are not part of the corpus.
- Empty documents are left out.
- A document is held out when the first 8 bytes of sha256(name\\0 + bytes), as a fraction of 2**64, are below
  ``validation``: what else is in the corpus does not matter.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import json
from abc import ABC, abstractmethod
from base64 import urlsafe_b64decode
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Protocol

from harness.data.extensions import check_arguments, load_class, source_digest
from harness.errors import ConfigError, EnvironmentFault, VerificationFailed
from harness.settings import Data

# Written when a wheel is built: they differ between the CPU and CUDA builds of one version.
_BUILD_STAMPS = frozenset({"version.py", "_version.py"})
# A long text becomes several documents, so that some of one book can be held out.
_TEXT_PIECE_BYTES = 1 << 16
_NAMED_IN_ERRORS = 5


@dataclass(frozen=True)
class Document:
    """One piece of text, tokenized and held out as a whole."""

    name: str
    text: bytes

    def held_out(self, share: float) -> bool:
        """Whether this is one of the ``share`` of documents that are never trained on."""
        digest = hashlib.sha256(self.name.encode() + b"\0" + self.text).digest()
        return int.from_bytes(digest[:8], "big") < share * 2**64


class Files(Protocol):
    """The seam of corpora: ``data.kind: package.module:Class``, constructed as ``Class(data, base)``."""

    def names(self) -> Sequence[str]:
        """The files, in the order of use. The same in every process."""
        ...

    def read(self, name: str) -> bytes:
        """The bytes of a file; they are held in memory while its documents are read."""
        ...

    def documents(self, name: str, content: bytes) -> Iterator[Document]:
        """The documents of the file ``name`` with the bytes ``content``."""
        ...


@dataclass(frozen=True)
class Corpus:
    """Files that were read and digested once; made by `open_corpus`."""

    source: Files
    read: Mapping[str, str]
    """Name to hex sha256 of the files within the limit, in order of use."""
    code: Mapping[str, str]
    """Import path to hex sha256 of a user's own corpus class: another class may read other documents."""
    limit: int | None

    @property
    def files(self) -> dict[str, str]:
        """Name to hex sha256 of everything the documents depend on."""
        return {**self.read, **self.code}

    @property
    def digest(self) -> str:
        """Hex sha256 over `files`."""
        return files_digest(self.files)

    def documents(self, on_file: Callable[[], None] | None = None) -> Iterator[Document]:
        """The documents in order; ``on_file`` is called after each file.

        Raises `VerificationFailed` when a file changed since it was digested.
        """
        left = self.limit
        for name, expected in self.read.items():
            content = self.source.read(name)
            if hashlib.sha256(content).hexdigest() != expected:
                raise VerificationFailed("file changed while it was read", where=name, remedy="start again")
            for document in self.source.documents(name, content):
                if left is not None and len(document.text) >= left:
                    yield Document(document.name, _cut(document.text, left))
                    return
                left = None if left is None else left - len(document.text)
                if document.text:
                    yield document
            if on_file:
                on_file()


def open_corpus(data: Data, base: Path) -> Corpus:
    """The corpus that ``data`` describes; its relative paths start at ``base``, the config's folder.

    Raises `ConfigError` for a missing file, an empty pattern or an unknown kind, `EnvironmentFault` for a
    package that is not installed, `VerificationFailed` for files that differ from their RECORD.
    """
    code: dict[str, str] = {}
    source: Files
    if data.kind == "wheel":
        source = WheelFiles(data.packages)
    elif data.kind in _FILE_KINDS:
        source = _FILE_KINDS[data.kind](data, base)
    else:
        kind = load_class(data.kind, base, "data.kind", ["wheel", *_FILE_KINDS, "tokens"])
        check_arguments(kind, {"data": data, "base": base}, "data.kind")
        source = kind(data=data, base=base)
        code = {data.kind: source_digest(kind)}
    read = _digests(source, data.limit_bytes)
    if isinstance(source, WheelFiles):
        source.check(read)
    return Corpus(source, read, code, data.limit_bytes)


def files_digest(files: Mapping[str, str]) -> str:
    """Hex sha256 over the sorted lines ``name\\0digest\\n``."""
    lines = "".join(f"{name}\0{digest}\n" for name, digest in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def matching_files(patterns: Sequence[str], base: Path) -> dict[str, Path]:
    """Paths that match ``patterns`` (relative to ``base``), sorted, by the name they have in a digest.

    A file under ``base`` is named relative to it, so that a moved folder stays the same corpus. Raises
    `ConfigError` when there are no patterns or one matches no file.
    """
    if not patterns:
        raise ConfigError("data.files is empty", remedy="list paths or patterns, relative to the config file")
    found: dict[str, Path] = {}
    for pattern in patterns:
        paths = [Path(path) for path in glob(str(base / pattern), recursive=True)]
        files = [path for path in paths if path.is_file()]
        if not files:
            raise ConfigError(
                f"data.files: nothing matches {pattern!r}", where=str(base), remedy="check the path"
            )
        for path in files:
            name = path.relative_to(base) if path.is_relative_to(base) else path
            found[name.as_posix()] = path
    return dict(sorted(found.items()))


def recorded_files(package: str, wanted: Callable[[str], bool]) -> dict[str, tuple[Path, str]]:
    """The files of an installed ``package`` inside site-packages whose name in RECORD is ``wanted``.

    Name to path and hex sha256. Raises `EnvironmentFault` when it is not installed or has no RECORD.
    """
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise EnvironmentFault(
            f"package {package!r} is not installed", remedy=f"pip install {package}"
        ) from error
    record = distribution.read_text("RECORD")
    if record is None:
        raise EnvironmentFault(
            f"package {package!r} has no RECORD", remedy=f"install it from a wheel: pip install {package}"
        )
    root = Path(str(distribution.locate_file("")))
    rows = (row for row in csv.reader(record.splitlines()) if row and not row[0].startswith(("/", "../")))
    return {row[0]: (root / row[0], _recorded_digest(row)) for row in rows if wanted(row[0])}


def _recorded_digest(row: Sequence[str]) -> str:
    """Hex sha256 in a row of RECORD (name, ``sha256=`` and unpadded base64, size), else what no file has."""
    encoded = row[1].removeprefix("sha256=") if len(row) > 1 and row[1].startswith("sha256=") else ""
    try:
        return urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4)).hex()
    except ValueError:
        return ""


class WheelFiles:
    """The .py files of installed ``packages``; their build stamps (version.py) are left out."""

    def __init__(self, packages: Sequence[str]) -> None:
        files: dict[str, tuple[Path, str]] = {}
        for package in packages:
            modules = recorded_files(package, _is_module)
            if not modules:
                raise EnvironmentFault(
                    f"RECORD of {package!r} lists no .py file", remedy="name another package in data.packages"
                )
            files |= modules
        if not files:
            raise ConfigError("data.packages is empty", remedy="name an installed package")
        self._files = dict(sorted(files.items()))

    def names(self) -> Sequence[str]:
        """The names in RECORD, sorted."""
        return list(self._files)

    def read(self, name: str) -> bytes:
        """The file's bytes. Raises `VerificationFailed` when it is gone."""
        try:
            return self._files[name][0].read_bytes()
        except OSError as error:
            raise VerificationFailed(
                f"{name} is listed in RECORD and cannot be read ({error.strerror})",
                remedy="install the package again",
            ) from error

    def documents(self, name: str, content: bytes) -> Iterator[Document]:
        """The file itself."""
        yield Document(name, content)

    def check(self, digests: Mapping[str, str]) -> None:
        """Raise `VerificationFailed`, naming them, when any of ``digests`` is not the one in RECORD."""
        wrong = [name for name, digest in digests.items() if digest != self._files[name][1]]
        if wrong:
            more = f" and {len(wrong) - _NAMED_IN_ERRORS} more" if len(wrong) > _NAMED_IN_ERRORS else ""
            raise VerificationFailed(
                f"{len(wrong)} files differ from their digest in RECORD",
                where=", ".join(wrong[:_NAMED_IN_ERRORS]) + more,
                remedy="install the package again",
            )


class _MatchedFiles(ABC):
    """Files that match the patterns of the config."""

    def __init__(self, data: Data, base: Path) -> None:
        self._paths = matching_files(data.files, base)
        self._field = data.field

    def names(self) -> Sequence[str]:
        return list(self._paths)

    def read(self, name: str) -> bytes:
        return self._paths[name].read_bytes()

    @abstractmethod
    def documents(self, name: str, content: bytes) -> Iterator[Document]: ...


class TextFiles(_MatchedFiles):
    """Text files; each is cut at line ends into documents of about 64 KiB, ``name#0``, ``name#1``…"""

    def documents(self, name: str, content: bytes) -> Iterator[Document]:
        """The pieces of the file; a line longer than a piece stays whole."""
        start = 0
        while start < len(content):
            newline = content.find(b"\n", start + _TEXT_PIECE_BYTES - 1)
            end = len(content) if newline < 0 else newline + 1
            yield Document(f"{name}#{start // _TEXT_PIECE_BYTES}", content[start:end])
            start = end


class JsonLines(_MatchedFiles):
    """One JSON object a line; the text is its field ``data.field``. Blank lines are left out."""

    def documents(self, name: str, content: bytes) -> Iterator[Document]:
        """The lines' texts, named ``file:line``. Raises `ConfigError` for a line without the field."""
        for number, line in enumerate(content.split(b"\n"), start=1):
            if line.strip():
                where = f"{name}:{number}"
                yield Document(where, _text_of(_parse_line(line, where), self._field, where))


class ParquetFiles(_MatchedFiles):
    """Parquet files; the texts are the column ``data.field``."""

    def __init__(self, data: Data, base: Path) -> None:
        super().__init__(data, base)
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise EnvironmentFault(
                "parquet files need pyarrow", remedy="pip install 'harness[parquet]'"
            ) from error
        self._parquet = pyarrow.parquet
        self._buffer = pyarrow.BufferReader

    def documents(self, name: str, content: bytes) -> Iterator[Document]:
        """The rows' texts, named ``file:row`` (from 0). Raises `ConfigError` when the column is missing."""
        try:
            table = self._parquet.ParquetFile(self._buffer(content))
        except ValueError as error:  # pyarrow.ArrowInvalid
            raise ConfigError(
                f"not a parquet file: {error}", where=name, remedy="check data.files"
            ) from error
        if self._field not in table.schema_arrow.names:
            raise ConfigError(
                f"no column {self._field!r}", where=name, remedy="set data.field to the text's column"
            )
        row = 0
        for batch in table.iter_batches(columns=[self._field]):
            for value in batch.column(0).to_pylist():
                where = f"{name}:{row}"
                yield Document(where, _text_of({self._field: value}, self._field, where))
                row += 1


_FILE_KINDS: dict[str, type[_MatchedFiles]] = {"text": TextFiles, "jsonl": JsonLines, "parquet": ParquetFiles}


def _digests(source: Files, limit: int | None) -> dict[str, str]:
    """Name to hex sha256 of the files that are read before ``limit`` bytes of documents are reached."""
    digests: dict[str, str] = {}
    left = limit
    for name in source.names():
        content = source.read(name)
        digests[name] = hashlib.sha256(content).hexdigest()
        if left is not None:
            left -= sum(len(document.text) for document in source.documents(name, content))
            if left <= 0:
                break
    return digests


def _is_module(name: str) -> bool:
    return name.endswith(".py") and name.rpartition("/")[2] not in _BUILD_STAMPS


def _parse_line(line: bytes, where: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"not JSON: {error}", where=where, remedy="one JSON object a line") from error


def _text_of(row: object, field: str, where: str) -> bytes:
    """The text of ``row`` as UTF-8. Raises `ConfigError` when there is none."""
    if not isinstance(row, dict) or not isinstance(row.get(field), str):
        raise ConfigError(
            f"no text in field {field!r}", where=where, remedy="set data.field to the text's field"
        )
    try:
        return str(row[field]).encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"text in field {field!r} is not Unicode: {error.reason}", where=where) from error


def _cut(text: bytes, limit: int) -> bytes:
    """The first ``limit`` bytes of ``text``, less the start of a character that would be cut in two."""
    end = min(limit, len(text))
    while 0 < end < len(text) and text[end] & 0xC0 == 0x80:
        end -= 1
    return text[:end]
