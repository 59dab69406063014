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
from base64 import urlsafe_b64decode
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from harness.data.documents import FILE_KINDS, Document
from harness.data.extensions import check_arguments, load_class, source_digest
from harness.errors import ConfigError, EnvironmentFault, VerificationFailed
from harness.settings import CHATS, PREPARED, WHEEL, Data
from harness.words import listed

# Written when a wheel is built: they differ between the CPU and CUDA builds of one version.
_BUILD_STAMPS = frozenset({"version.py", "_version.py"})
_NAMED_IN_ERRORS = 5


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
                    last = Document(document.name, _cut(document.text, left))
                    if last.text:
                        yield last
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
    if data.kind == CHATS:
        raise ConfigError(
            "data.kind chats cannot be trained on as it is",
            remedy="harness prepare writes them with a template; then data.kind=prepared",
        )
    source, code = files_of(data, base)
    read = _digests(source, data.limit_bytes)
    if isinstance(source, WheelFiles):
        source.check(read)
    return Corpus(source, read, code, data.limit_bytes)


def files_of(data: Data, base: Path) -> tuple[Files, dict[str, str]]:
    """The files that ``data`` names, not yet read; the digest of a user's own class by import path.

    Raises as `open_corpus` does.
    """
    if data.kind == WHEEL:
        return WheelFiles(data.packages), {}
    if data.kind in FILE_KINDS:
        return FILE_KINDS[data.kind](data, base), {}
    kind = load_class(data.kind, base, "data.kind", [WHEEL, *FILE_KINDS, "tokens", PREPARED])
    check_arguments(kind, {"data": data, "base": base}, "data.kind")
    return kind(data=data, base=base), {data.kind: source_digest(kind)}


def files_digest(files: Mapping[str, str]) -> str:
    """Hex sha256 over the sorted lines ``name\\0digest\\n``."""
    lines = "".join(f"{name}\0{digest}\n" for name, digest in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


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
            raise VerificationFailed(
                f"{len(wrong)} files differ from their digest in RECORD",
                where=listed(wrong, _NAMED_IN_ERRORS),
                remedy="install the package again",
            )


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


def _cut(text: bytes, limit: int) -> bytes:
    """The first ``limit`` bytes of ``text``, less the start of a character that would be cut in two."""
    end = min(limit, len(text))
    while 0 < end < len(text) and text[end] & 0xC0 == 0x80:
        end -= 1
    return text[:end]
