"""Documents, and the files of the user's own that they are read from: text, JSON lines, parquet,
chats.

A file that cannot be read, or a line of one, is an error that names it; none is skipped. Errors name the keys
`files` and `field` without their section: it is `data` in a run's config and `source` in a recipe.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path

from harness.audit.folders import prepared
from harness.data import chat
from harness.errors import ConfigError, EnvironmentFault
from harness.format.files import unreadable
from harness.settings import CHATS, Data

# A long text becomes several documents, so that some of one book can be held out.
_TEXT_PIECE_BYTES = 1 << 16


@dataclass(frozen=True)
class Document:
    """One piece of text, tokenized and held out as a whole."""

    name: str
    text: bytes

    def held_out(self, share: float) -> bool:
        """Whether this is one of the ``share`` of documents that are never trained on."""
        digest = hashlib.sha256(self.name.encode() + b"\0" + self.text).digest()
        return int.from_bytes(digest[:8], "big") < share * 2**64


def matching_files(patterns: Sequence[str], base: Path) -> dict[str, Path]:
    """Paths that match ``patterns`` (relative to ``base``), sorted, by the name they have in a digest.

    A file under ``base`` is named relative to it, so that a moved folder stays the same corpus. Raises
    `ConfigError` when there are no patterns or one matches no file, `EnvironmentFault` for a folder that
    cannot be listed.
    """
    if not patterns:
        raise ConfigError("`files` is empty", remedy="list paths or patterns, relative to the config file")
    matched: dict[str, Path] = {}
    for pattern in patterns:
        _require_readable(pattern, base)
        # Not glob(base / pattern): a folder may have a bracket in its name.
        paths = [base / found for found in glob(pattern, root_dir=base, recursive=True)]
        files = [path for path in paths if path.is_file()]
        if not files:
            raise ConfigError(
                f"`files`: nothing matches {pattern!r}", where=str(base), remedy="check the path"
            )
        for path in files:
            name = path.relative_to(base) if path.is_relative_to(base) else path
            matched[name.as_posix()] = path
    return dict(sorted(matched.items()))


def _require_readable(pattern: str, base: Path) -> None:
    """Raise `EnvironmentFault` for a folder that ``pattern`` leads into and that `glob` would pass over."""

    def refuse(error: OSError) -> None:
        raise unreadable(error, str(error.filename))

    parts = Path(pattern).parts
    root = base.joinpath(*itertools.takewhile(lambda part: not has_magic(part), parts))
    if root.is_dir():
        for _ in os.walk(root, onerror=refuse):
            if "**" not in parts:
                break


def prepared_folder(data: Data, base: Path) -> Path:
    """The one folder that ``data.files`` names. Raises `ConfigError` when it is no prepared corpus."""
    if len(data.files) != 1:
        raise ConfigError(
            f"data.files names {len(data.files)} corpora",
            remedy="name the one folder that harness prepare made",
        )
    folder = base / data.files[0]
    if not prepared.is_corpus(folder):
        raise ConfigError("no prepared corpus", where=str(folder), remedy="harness prepare makes it")
    return folder


class MatchedFiles(ABC):
    """Files that match the patterns of the config."""

    def __init__(self, data: Data, base: Path) -> None:
        self._paths = matching_files(data.files, base)
        self._field = data.field

    def names(self) -> Sequence[str]:
        """The names of `matching_files`."""
        return list(self._paths)

    def read(self, name: str) -> bytes:
        """The file's bytes. Raises `ConfigError` when it cannot be read."""
        try:
            return self._paths[name].read_bytes()
        except OSError as error:
            raise ConfigError(
                f"file cannot be read ({error.strerror})",
                where=str(self._paths[name]),
                remedy="check `files`",
            ) from error

    @abstractmethod
    def documents(self, name: str, content: bytes) -> Iterator[Document]:
        """The documents of the file ``name`` with the bytes ``content``."""


class TextFiles(MatchedFiles):
    """Text files; each is cut at line ends into documents of about 64 KiB, ``name#0``, ``name#1``…"""

    def documents(self, name: str, content: bytes) -> Iterator[Document]:
        """The pieces of the file; a line longer than a piece stays whole."""
        start = 0
        while start < len(content):
            newline = content.find(b"\n", start + _TEXT_PIECE_BYTES - 1)
            end = len(content) if newline < 0 else newline + 1
            yield Document(f"{name}#{start // _TEXT_PIECE_BYTES}", content[start:end])
            start = end


class JsonLines(MatchedFiles):
    """One JSON object a line; the text is its field ``data.field``. Blank lines are left out."""

    def documents(self, name: str, content: bytes) -> Iterator[Document]:
        """The lines' texts, named ``file:line``. Raises `ConfigError` for a line without the field."""
        for number, line in enumerate(content.split(b"\n"), start=1):
            if line.strip():
                where = f"{name}:{number}"
                yield Document(where, _text_of(_parse_line(line, where), self._field, where))


class ParquetFiles(MatchedFiles):
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
        """The rows' texts, named ``file:row`` (from 0).

        Raises `ConfigError` when the column is missing or the file is damaged.
        """
        row = 0
        try:
            for value in self._values(name, content):
                where = f"{name}:{row}"
                yield Document(where, _text_of({self._field: value}, self._field, where))
                row += 1
        except (ValueError, OSError) as error:  # pyarrow's own errors are subclasses
            first_line = str(error).strip().partition("\n")[0]
            raise ConfigError(
                f"not a parquet file, or a damaged one: {first_line}",
                where=f"{name}:{row}",
                remedy="check `files`",
            ) from error

    def _values(self, name: str, content: bytes) -> Iterator[object]:
        table = self._parquet.ParquetFile(self._buffer(content))
        if self._field not in table.schema_arrow.names:
            raise ConfigError(
                f"no column {self._field!r}",
                where=name,
                remedy=f"set `field` to the text's column: {', '.join(table.schema_arrow.names[:10])}",
            )
        for batch in table.iter_batches(columns=[self._field]):
            yield from batch.column(0).to_pylist()


class ChatLines(MatchedFiles):
    """One JSON object a line, whose field ``data.field`` is a list of messages. Blank lines are left out."""

    def documents(self, name: str, content: bytes) -> Iterator[Document]:
        """The chats, as `chat.written` writes them. Raises `ConfigError` for a line without one."""
        for number, line in enumerate(content.split(b"\n"), start=1):
            if line.strip():
                where = f"{name}:{number}"
                row = _parse_line(line, where)
                value = row.get(self._field) if isinstance(row, dict) else None
                yield Document(
                    where, chat.written(chat.messages_of(value, f"{where}, field {self._field!r}"))
                )


FILE_KINDS: dict[str, type[MatchedFiles]] = {
    "text": TextFiles,
    "jsonl": JsonLines,
    "parquet": ParquetFiles,
    CHATS: ChatLines,
}
"""The classes by ``data.kind``."""


def _parse_line(line: bytes, where: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"not JSON: {error}", where=where, remedy="one JSON object a line") from error


def _text_of(row: object, field: str, where: str) -> bytes:
    """The text of ``row`` as UTF-8. Raises `ConfigError` when there is none."""
    if not isinstance(row, dict) or field not in row:
        raise ConfigError(f"no field {field!r}", where=where, remedy="set `field` to the text's field")
    if not isinstance(row[field], str):
        kind = "null" if row[field] is None else f"a {type(row[field]).__name__}"
        raise ConfigError(
            f"field {field!r} is {kind}, no text",
            where=where,
            remedy="set `field` to the text's field, or leave such rows out of the file",
        )
    try:
        return str(row[field]).encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"text in field {field!r} is not Unicode: {error.reason}", where=where) from error
