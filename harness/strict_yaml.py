"""A strict reader of YAML: what is written is what is meant, and every value knows its line.

- scalars follow YAML 1.2: only ``true`` and ``false`` are booleans (``off``, ``on``, ``yes``, ``no`` are
  strings), ``1e-3`` is a float, ``007``, ``0x10`` and ``1_000`` are strings
- a quoted scalar is a string; ``null``, ``~`` and nothing are null
- an infinite float and an integer beyond 2**53 are errors
- duplicate keys, keys that are no strings, and keys longer than 100 characters are errors
- anchors, aliases, tags, directives and several documents are errors
- at most 256 KiB and 16 levels

Example::

    >>> read("train: {steps: 10}\\nprecision: bf16", "run.yaml").value
    {'train': {'steps': 10}, 'precision': 'bf16'}
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

import yaml
from yaml import events

from harness.errors import ConfigError

LIMIT_BYTES = 256 * 1024
LIMIT_LEVELS = 16
LIMIT_KEY = 100
LIMIT_INTEGER = 2**53

Path = tuple[str, ...]

_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS = {"": None, "~": None, "null": None, "true": True, "false": False}
# What YAML 1.1 takes for something else; quoted when written, so that every reader agrees.
_WORDS_1_1 = {"y", "n", "yes", "no", "on", "off", "true", "false", "null", ".inf", ".nan"}
# An integer of this many digits is beyond the limit; longer ones Python refuses to convert.
_LONGEST_INTEGER = 20
_PLAIN = re.compile(r"[A-Za-z_./][A-Za-z0-9_./-]*")
_LEADING_ZERO = re.compile(r"[-+]?0[0-9]+")


@dataclass(frozen=True)
class Document:
    """A document as plain Python values."""

    value: Any
    """None, bool, int, float, str, list or dict, nested."""
    lines: dict[Path, int]
    """Line of each key of nested mappings, counted from 1; lists are not followed."""
    inside: dict[Path, int] = field(default_factory=dict)
    """The same for what lies in a list: of each item, by its number, and of the keys of mappings in it."""


def read(text: str, where: str, level: int = 0) -> Document:
    """Parse ``text``; ``where`` names it in errors. Raises `ConfigError` with ``where:line``.

    ``level`` is how deep the text is nested in the document that it becomes part of.
    """
    if len(text.encode("utf-8", "replace")) > LIMIT_BYTES:
        raise ConfigError(f"the file is larger than {LIMIT_BYTES} bytes", where=where)
    try:
        return _Reader(text, where, level).document()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = error.problem or error.context or "cannot be read"
        raise ConfigError(f"not YAML: {problem}", where=f"{where}:{mark.line + 1 if mark else 1}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"not YAML: {error.reason}", where=f"{where}:{line}") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        # PyYAML lets these through for an escape like "\UFFFFFFFF" and for an absurd %YAML version.
        raise ConfigError(f"not YAML: {error}", where=where) from error


def scalar(text: str) -> bool | int | float | str | None:
    """The value of a plain (unquoted) scalar. Raises `ValueError` for a number that is out of range."""
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        if len(text) > _LONGEST_INTEGER or abs(int(text)) > LIMIT_INTEGER:
            raise ValueError("an integer beyond 2**53")
        return int(text)
    if _FLOAT.fullmatch(text) and not _LEADING_ZERO.fullmatch(text):
        value = float(text)
        if math.isinf(value):
            raise ValueError("a float beyond the largest")
        return value
    return text


def write(value: Any) -> str:
    """``value`` on one line; `read` gives it back. Paths become strings.

    Raises `ConfigError` for what a config cannot hold.
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int) and abs(value) <= LIMIT_INTEGER:
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return _write_float(value)
    if isinstance(value, (str, PurePath)):
        return _write_text(str(value))
    if isinstance(value, list):
        return f"[{', '.join(map(write, value))}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_quoted(name)}: {write(inner)}" for name, inner in value.items()) + "}"
    raise ConfigError(f"a config cannot hold {_short(repr(value))}")


def _write_float(value: float) -> str:
    """The shortest decimal, with a point, without which YAML 1.1 takes ``1e-08`` for a string."""
    text = repr(value)
    return text if "." in text else text.replace("e", ".0e")


def _write_text(text: str) -> str:
    plain = _PLAIN.fullmatch(text) and scalar(text) == text and text.lower() not in _WORDS_1_1
    return text if plain else _quoted(text)


def _quoted(text: str) -> str:
    return '"' + "".join(map(_escaped, text)) + '"'


def _escaped(character: str) -> str:
    if character in '"\\':
        return f"\\{character}"
    if character.isprintable():
        return character
    # YAML folds or refuses the others when they are written as they are (line separators, byte order marks).
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


class _Reader:
    """Builds values from parser events, which still say what was anchored, tagged or quoted."""

    def __init__(self, text: str, where: str, level: int) -> None:
        self._where = where
        self._level = level
        self._events: Iterator[events.Event] = yaml.parse(text, Loader=yaml.SafeLoader)
        self._lines: dict[Path, int] = {}
        self._inside: dict[Path, int] = {}

    def document(self) -> Document:
        next(self._events)
        start = next(self._events)
        if isinstance(start, events.StreamEndEvent):
            return Document(None, {})
        if isinstance(start, events.DocumentStartEvent) and (start.version or start.tags):
            raise self._refusal(start, "directives (%YAML, %TAG) are not used here")
        value = self._value(next(self._events), (), self._level, self._lines)
        next(self._events)
        after = next(self._events)
        if not isinstance(after, events.StreamEndEvent):
            raise self._refusal(after, "one document only; remove what follows ---")
        return Document(value, self._lines, self._inside)

    def _value(self, event: events.Event, path: Path, level: int, lines: dict[Path, int]) -> Any:
        """The node that starts at ``event``; ``lines`` is where the places of what it holds go."""
        self._check(event, level)
        if isinstance(event, events.ScalarEvent):
            return self._scalar(event)
        if isinstance(event, events.SequenceStartEvent):
            return self._list(path, level)
        return self._mapping(path, level, lines)

    def _check(self, event: events.Event, level: int) -> None:
        if isinstance(event, events.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise self._refusal(event, "anchors (&) and aliases (*) are not used here; quote the text")
        if getattr(event, "tag", None) is not None:
            raise self._refusal(event, "tags (!) are not used here; quote the text")
        if level > LIMIT_LEVELS:
            raise self._refusal(event, f"nested deeper than {LIMIT_LEVELS} levels")

    def _scalar(self, event: events.ScalarEvent) -> Any:
        text: str = event.value
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise self._refusal(event, "half of a surrogate pair is no character")
        if event.style is not None:
            return text
        try:
            return scalar(text)
        except ValueError as error:
            raise self._refusal(event, f"{_short(text)} is {error}") from error

    def _list(self, path: Path, level: int) -> list[Any]:
        items: list[Any] = []
        while not isinstance(event := next(self._events), events.SequenceEndEvent):
            inner = (*path, str(len(items)))
            self._inside[inner] = _line(event)
            items.append(self._value(event, inner, level + 1, self._inside))
        return items

    def _mapping(self, path: Path, level: int, lines: dict[Path, int]) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        while not isinstance(event := next(self._events), events.MappingEndEvent):
            name = self._key(event, level)
            inner = (*path, name)
            if name in mapping:
                raise self._refusal(event, f"duplicate key {name!r}, first on line {lines[inner]}")
            lines[inner] = _line(event)
            mapping[name] = self._value(next(self._events), inner, level + 1, lines)
        return mapping

    def _key(self, event: events.Event, level: int) -> str:
        self._check(event, level)
        name = self._scalar(event) if isinstance(event, events.ScalarEvent) else None
        if not isinstance(name, str) or not name:
            raise self._refusal(event, "a key must be a name; quote it when it is meant as text")
        if len(name) > LIMIT_KEY:
            raise self._refusal(event, f"a key is longer than {LIMIT_KEY} characters")
        return name

    def _refusal(self, event: events.Event, what: str) -> ConfigError:
        return ConfigError(what, where=f"{self._where}:{_line(event)}")


def _line(event: events.Event) -> int:
    return event.start_mark.line + 1 if event.start_mark else 1


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."
