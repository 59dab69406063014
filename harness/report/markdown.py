"""A report as Markdown, with pictures beside it."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from harness.errors import visible
from harness.report.document import (
    Block,
    Bullets,
    Heading,
    Link,
    Paragraph,
    Picture,
    Source,
    Status,
    Table,
    readable,
    right_aligned,
)

_SIGNS = {"good": "✔", "bad": "✘", "open": "?"}
_SPECIAL = re.compile(r"([\\`*_\[\]<>#|~&])")
_CODE = re.compile(r"((?<!`)`[^`]+`(?!`))")
"""A code span of single backticks. Beside further backticks Markdown would see others than this does, and
what lies in between would be markup."""


def text(value: str) -> str:
    """``value`` with everything that Markdown would read as markup escaped; code spans stay. Signs that would
    turn the reading around or do not show are escaped as well."""
    if isinstance(value, Link):
        return f"[{text(str(value))}](#{value.target})"
    parts = _CODE.split(visible(" ".join(value.split())))
    return "".join(
        part.replace("|", r"\|") if number % 2 else _SPECIAL.sub(r"\\\1", part)
        for number, part in enumerate(parts)
    )


def render(blocks: Sequence[Block]) -> str:
    """The whole document, ending in one newline."""
    return "\n\n".join(_block(block) for block in blocks) + "\n"


def _block(block: Block) -> str:
    match block:
        case Heading(level, title):
            return f"{'#' * level} {text(title)}"
        case Paragraph(words):
            return text(words)
        case Bullets(items):
            return "\n".join(f"- {text(item)}" for item in items)
        case Status(kind, words):
            return f"> {_SIGNS[kind]} **{text(words)}**"
        case Picture(_, _, file, alternative):
            return f"![{text(alternative)}]({file})"
        case Source(title, body):
            # Inside of HTML nothing is Markdown, so its escapes would not count.
            summary = f"<summary>{html.escape(visible(title))}</summary>"
            return f"<details>{summary}\n\n{_fenced(readable(body))}\n\n</details>"
        case Table():
            return _table(block)


def _fenced(body: str) -> str:
    """``body`` as code, behind a fence longer than any run of backticks in it."""
    longest = max((len(run) for run in re.findall("`+", body)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{body.rstrip()}\n{fence}"


def _table(table: Table) -> str:
    rule = ["---:" if right else "---" for right in right_aligned(table)]
    rows = [[text(cell) for cell in row] for row in (table.head, *table.rows)]
    lines = [rows[0], rule, *rows[1:]]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
