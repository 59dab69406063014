"""Bars over the steps of runs, as SVG: which launch made which, where an order-dependent kernel was seen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from harness.report.figure import (
    LEFT,
    LETTER,
    LINE,
    RIGHT,
    WIDTH,
    Scale,
    flow,
    label,
    moved,
    page,
    shortened,
    steps,
)

_ROW, _BAR, _TOP, _BELOW = 34, 10, 62, 46
_BOX = 18
"""Pixels of a colour before its name in the legend."""
_LEAST = 3.0
"""Pixels of the shortest bar: one step of many must be seen."""


@dataclass(frozen=True)
class Span:
    """A bar from one step to another."""

    start: float
    end: float
    kind: str
    """What its colour means; one of the chart's kinds."""


@dataclass(frozen=True)
class Row:
    """Bars under one name."""

    name: str
    spans: tuple[Span, ...]


def draw(title: str, rows: Sequence[Row], kinds: Sequence[str], last: int, width: int = WIDTH) -> str:
    """The chart of steps up to ``last`` as one ``<svg>`` element, ``width`` pixels across; ``kinds`` in the
    order of their colours."""
    reached = max((span.end for row in rows for span in row.spans), default=0.0)
    across = Scale(0.0, max(reached, last, 1.0), LEFT, width - RIGHT)
    base = _TOP + _ROW * len(rows)
    used = {span.kind for row in rows for span in row.spans}
    legend, lower = _legend([(number, kind) for number, kind in enumerate(kinds) if kind in used], width)
    body = [
        *(text for number, row in enumerate(rows) for text in _row(row, _TOP + _ROW * number, across, kinds)),
        *steps(across, base),
        label((across.start + across.end) / 2, base + _BELOW - 8, "step", "middle"),
    ]
    return page(title, width, base + _BELOW + lower, [*legend, *moved(body, lower)])


def _row(row: Row, top: int, across: Scale, kinds: Sequence[str]) -> Iterator[str]:
    yield label(LEFT, top + 12, shortened(row.name, across.end + RIGHT - LEFT), "start")
    for span in row.spans:
        start, end = across(span.start), across(span.end)
        start = min(start, across.end - _LEAST)
        yield (
            f'<rect class="c{kinds.index(span.kind)}" x="{start:.1f}" y="{top + 17}" '
            f'width="{max(end - start, _LEAST):.1f}" height="{_BAR}">'
            f"<title>{escape(span.kind)}, steps {span.start:g} to {span.end:g}</title></rect>"
        )


def _legend(kinds: Sequence[tuple[int, str]], width: int) -> tuple[list[str], int]:
    """The meaning of the colours, and how many pixels it takes beyond one row."""
    places = flow([_BOX + 22 + LETTER * len(kind) for _, kind in kinds], width + 22)
    drawn: list[str] = []
    for (number, kind), (x, row) in zip(kinds, places, strict=True):
        y = 39 + LINE * row
        drawn.append(f'<rect class="c{number}" x="{x:.1f}" y="{y}" width="12" height="{_BAR}"/>')
        drawn.append(label(x + _BOX, y + 9, kind, "start"))
    return drawn, LINE * max((row for _, row in places), default=0)
