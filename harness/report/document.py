"""The blocks of a report, which `markdown` and `html` print.

Text may hold code between backticks, as in Markdown; everything else in it is shown as it is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from harness.errors import visible


class Link(str):
    """The title of a section of the report, in a table: shown as a link to it."""

    __slots__ = ()

    @property
    def target(self) -> str:
        """`anchor` of the title."""
        return anchor(self)


def anchor(title: str) -> str:
    """The name of a heading in an address, as GitHub makes it of Markdown: ``Artefact provenance`` gives
    ``artefact-provenance``."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


@dataclass(frozen=True)
class Heading:
    """A title; ``level`` 1 is the report's own, and only 2 can be linked to: its words are never a run's."""

    level: int
    text: str


@dataclass(frozen=True)
class Paragraph:
    """Running text."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """A list of short texts."""

    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    """Rows of texts under a head; columns whose cells are all numbers are set to the right."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """An SVG; the page holds it, and it also stands alone in ``file`` beside the Markdown."""

    svg: str
    narrow: str
    """The same for a phone."""
    file: str
    alternative: str


@dataclass(frozen=True)
class Source:
    """Long text behind a fold, such as a config."""

    title: str
    text: str


@dataclass(frozen=True)
class Status:
    """One line that a reader must not miss; ``kind`` is ``good``, ``bad`` or ``open``."""

    kind: str
    text: str


Block = Heading | Paragraph | Bullets | Table | Picture | Source | Status


def readable(body: str) -> str:
    """A text of several lines with escapes for what does not show, or would turn the reading around."""
    return "\n".join(map(visible, body.split("\n")))


def is_number(text: str) -> bool:
    """Whether ``text`` reads as a number, with separators, ± or per cent in it; a dash counts as none."""
    kept = text.replace(",", "").replace(" ", "").replace("±", "").replace("%", "").replace("—", "0")
    try:
        float(kept or "0")
    except ValueError:
        return False
    return True


def right_aligned(table: Table) -> list[bool]:
    """For each column, whether all its cells are numbers."""
    return [
        bool(table.rows) and all(is_number(row[column]) for row in table.rows)
        for column in range(len(table.head))
    ]
