"""Bars over the steps of runs, as SVG: which launch made which, where an order-dependent kernel was seen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from harness.report.figure import LEFT, RIGHT, WIDTH, Scale, label, page, steps

_ROW, _BAR, _TOP, _BELOW = 34, 10, 62, 46
_LETTER = 6.6
"""Pixels of a letter, about."""
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


def draw(title: str, rows: Sequence[Row], kinds: Sequence[str], last: int) -> str:
    """The chart of steps up to ``last`` as one ``<svg>`` element; ``kinds`` in the order of their colours."""
    reached = max((span.end for row in rows for span in row.spans), default=0.0)
    across = Scale(0.0, max(reached, last, 1.0), LEFT, WIDTH - RIGHT)
    base = _TOP + _ROW * len(rows)
    used = {span.kind for row in rows for span in row.spans}
    body = [
        *_legend([(number, kind) for number, kind in enumerate(kinds) if kind in used]),
        *(text for number, row in enumerate(rows) for text in _row(row, _TOP + _ROW * number, across, kinds)),
        *steps(across, base),
        label((LEFT + WIDTH - RIGHT) / 2, base + _BELOW - 8, "step", "middle"),
    ]
    return page(title, base + _BELOW, body)


def _row(row: Row, top: int, across: Scale, kinds: Sequence[str]) -> Iterator[str]:
    yield label(LEFT, top + 12, row.name, "start")
    for span in row.spans:
        start, end = across(span.start), across(span.end)
        start = min(start, WIDTH - RIGHT - _LEAST)
        yield (
            f'<rect class="c{kinds.index(span.kind)}" x="{start:.1f}" y="{top + 17}" '
            f'width="{max(end - start, _LEAST):.1f}" height="{_BAR}">'
            f"<title>{escape(span.kind)}, steps {span.start:g} to {span.end:g}</title></rect>"
        )


def _legend(kinds: Sequence[tuple[int, str]]) -> Iterator[str]:
    x = float(LEFT)
    for number, kind in kinds:
        yield f'<rect class="c{number}" x="{x:.1f}" y="39" width="12" height="{_BAR}"/>'
        yield label(x + 18, 48, kind, "start")
        x += 40 + _LETTER * len(kind)
