"""Line charts as SVG, one self-contained element each, for a page, a README or a mail.

Colours follow the reader's light or dark scheme by CSS; nothing is loaded from outside. Example::

    >>> curve = Series("run a", ((1, 4.0), (2, 3.5), (3, 3.2)))
    >>> draw(Figure("loss", "step", "nats", (curve,))).startswith("<svg")
    True
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from textwrap import wrap

from harness.errors import visible
from harness.report.curves import BINS, LIMIT, Point, drawable, thin

WIDTH, HEIGHT = 760, 340
NARROW = 362
"""Pixels across a picture that a phone shows whole, its letters as large as the page's."""
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 62, 46
LETTER = 7.0
"""Pixels of a letter of a label, at most on average."""
LINE = 18
"""Pixels from one row of a legend or title to the next."""
_TITLE_LETTER = 9.2
_LONGEST_NAME = 90
_BETWEEN_TICKS = 85
"""Pixels, about."""
_SAMPLE = 26
"""Pixels of the piece of a curve before its name."""
_ASIDE = 5
"""Pixels between a vertical line and its label."""

# Okabe and Ito's palette, distinguishable for colour-blind readers; the second value is for dark pages.
_COLOURS = (
    ("#0072b2", "#56b4e9"),
    ("#d55e00", "#f0883e"),
    ("#009e73", "#3fc79a"),
    ("#aa4499", "#d689c6"),
    ("#8a6d00", "#e6c34a"),
    ("#555555", "#b0b0b0"),
)

_RULES = """
.hf text{font:12px system-ui,-apple-system,"Segoe UI",Helvetica,Arial,sans-serif;fill:#57606a}
.hf .title{font-size:15px;font-weight:600;fill:#1f2328}
.hf .grid{stroke:#d0d7de;stroke-width:1}
.hf .axis{stroke:#8c959f;stroke-width:1}
.hf .mark{stroke:#8c959f;stroke-width:1;stroke-dasharray:4 4}
.hf .curve{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.hf .faint{stroke-width:1;opacity:.35}
.hf .band{stroke:none;opacity:.18}
"""
_DARK_RULES = """
.hf text{fill:#9da7b1}
.hf .title{fill:#e6edf3}
.hf .grid{stroke:#30363d}
.hf .axis,.hf .mark{stroke:#6e7681}
"""


@dataclass(frozen=True)
class Series:
    """One curve: points sorted by x. A point whose y is not finite breaks the line and is marked."""

    name: str
    points: tuple[Point, ...]
    colour: int = 0
    """Index into the palette, so that curves of one run share a colour."""
    dots: bool = False
    """Whether each point is marked: for sparse values such as evaluations."""
    faint: bool = False
    """Drawn thin, behind, and without a legend entry of its own when the name is empty."""


@dataclass(frozen=True)
class Mark:
    """A vertical line at some x, such as a resume."""

    x: float
    label: str


@dataclass(frozen=True)
class Band:
    """An area around a curve: (x, low, high), sorted by x."""

    points: tuple[tuple[float, float, float], ...]
    colour: int = 0


@dataclass(frozen=True)
class Figure:
    """What a chart shows."""

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    marks: tuple[Mark, ...] = ()
    from_zero: bool = False
    """Whether the y axis starts at zero, for quantities whose ratio matters."""
    bands: tuple[Band, ...] = ()


@dataclass(frozen=True)
class Scale:
    """From values to pixels along one axis."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def ticks(low: float, high: float, wanted: int = 6) -> list[float]:
    """About ``wanted`` round values (1, 2 or 5 times a power of ten) inside ``low`` to ``high``."""
    rough = (high - low) / max(wanted - 1, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def number(value: float, largest: float) -> str:
    """A short label on an axis up to ``largest``: ``1.2M``, ``5k`` beside ``10k``, ``0.25``."""
    if abs(value) <= 1e-9 * abs(largest):
        return "0"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if largest >= 10 * size:
            return f"{value / size:.6g}{letter}"
    return f"{value:.6g}"


def draw(figure: Figure, width: int = WIDTH) -> str:
    """The chart as one ``<svg>`` element, ``width`` pixels across."""
    across, up = _scales(figure, width)
    legend, rows = _legend(figure.series, width)
    body = [
        *_frame(figure, across, up),
        *_marks(figure.marks, across),
        *(text for band in figure.bands for text in _area(band, across, up)),
        *(
            text
            for series in sorted(figure.series, key=lambda s: not s.faint)
            for text in _curve(series, across, up)
        ),
    ]
    lower = LINE * (rows - 1)
    return page(figure.title, width, HEIGHT + lower, [*legend, *moved(body, lower)])


def page(title: str, width: int, height: int, body: Sequence[str]) -> str:
    """``body`` as one ``<svg>`` element, in the colours of all pictures, under its title."""
    dark = "".join(f".hf .c{index}{{stroke:{pair[1]};fill:{pair[1]}}}" for index, pair in enumerate(_COLOURS))
    light = "".join(
        f".hf .c{index}{{stroke:{pair[0]};fill:{pair[0]}}}" for index, pair in enumerate(_COLOURS)
    )
    style = f"{light}{_RULES}@media(prefers-color-scheme:dark){{{dark}{_DARK_RULES}.hf .curve{{fill:none}}}}"
    lines = wrap(title, int((width - LEFT) / _TITLE_LETTER))
    words = "".join(
        f'<text class="title" x="{LEFT}" y="{24 + LINE * number}">{_text(line)}</text>'
        for number, line in enumerate(lines)
    )
    lower = LINE * (len(lines) - 1) if lines else 0
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="hf" viewBox="0 0 {width} {height + lower}" '
        f'width="{width}" height="{height + lower}" role="img" aria-label="{_text(title)}">'
        f"<style>{style}</style>{words}{''.join(moved(body, lower))}</svg>"
    )


def moved(body: Sequence[str], lower: int) -> Sequence[str]:
    """``body``, so many pixels further down."""
    return [f'<g transform="translate(0 {lower})">', *body, "</g>"] if lower else body


def steps(across: Scale, base: int) -> Iterator[str]:
    """The axis below, ``base`` pixels from the top, with its labels."""
    yield f'<line class="axis" x1="{across.start}" x2="{across.end}" y1="{base}" y2="{base}"/>'
    for value in ticks(across.low, across.high, max(4, round((across.end - across.start) / _BETWEEN_TICKS))):
        x = across(value)
        yield f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{base}" y2="{base + 5}"/>'
        yield label(x, base + 19, number(value, across.high), "middle")


def label(x: float, y: float, words: str, anchor: str) -> str:
    """``words`` at a place."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{_text(words)}</text>'


def shortened(words: str, room: float) -> str:
    """``words``, or their end, which tells names apart, where they take more than ``room`` pixels."""
    most = max(1, int(room / LETTER))
    return words if len(words) <= most else f"…{words[len(words) + 1 - most :]}"


def flow(widths: Sequence[float], right: float) -> list[tuple[float, int]]:
    """Where things of ``widths`` pixels lie, in rows from `LEFT` to ``right``: x, and the row."""
    places: list[tuple[float, int]] = []
    x, row = float(LEFT), 0
    for width in widths:
        if x > LEFT and x + width > right:
            x, row = float(LEFT), row + 1
        places.append((x, row))
        x += width
    return places


def _finite(series: Sequence[Series]) -> list[Point]:
    return [point for one in series for point in one.points if drawable(point[1])]


def _scales(figure: Figure, width: int) -> tuple[Scale, Scale]:
    every = [point for one in figure.series for point in one.points]
    edges = [(x, y) for band in figure.bands for x, *pair in band.points for y in pair if drawable(y)]
    finite = _finite(figure.series) + edges
    x_low, x_high = _span([0.0, *(x for x, _ in every), *(mark.x for mark in figure.marks)])
    y_low, y_high = _span([y for _, y in finite] + ([0.0] if figure.from_zero else []))
    room = (y_high - y_low) * 0.05
    bottom = y_low if figure.from_zero else y_low - room
    across = Scale(x_low, x_high, LEFT, width - RIGHT)
    return across, Scale(bottom, y_high + room, HEIGHT - BOTTOM, TOP)


def _span(values: Sequence[float]) -> tuple[float, float]:
    """Lowest and highest, made to differ."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        pad = abs(low) * 0.1 or 1.0
        return low - pad, low + pad
    return low, high


def _frame(figure: Figure, across: Scale, up: Scale) -> Iterator[str]:
    """Grid, axes and their labels."""
    for value in ticks(up.low, up.high):
        y = up(value)
        yield f'<line class="grid" x1="{across.start}" x2="{across.end}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield label(across.start - 8, y + 4, number(value, up.high), "end")
    base = HEIGHT - BOTTOM
    yield from steps(across, base)
    yield label((across.start + across.end) / 2, HEIGHT - 8, figure.x_label, "middle")
    height = (TOP + base) / 2
    yield (
        f'<text x="16" y="{height}" text-anchor="middle" transform="rotate(-90 16 {height})">'
        f"{_text(figure.y_label)}</text>"
    )


def _marks(marks: Sequence[Mark], across: Scale) -> Iterator[str]:
    last = -math.inf
    for mark in sorted(marks, key=lambda one: one.x):
        x = across(mark.x)
        yield f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        before, behind = x - across.start - _ASIDE, across.end - x - _ASIDE
        right = behind >= min(LETTER * len(mark.label), before)
        words = shortened(mark.label, behind if right else before)
        left = x + _ASIDE if right else x - _ASIDE - LETTER * len(words)
        # Labels that would overlap are left out; the lines stay.
        if left > last:
            anchor, shift = ("start", _ASIDE) if right else ("end", -_ASIDE)
            yield label(x + shift, TOP + 12, words, anchor)
            last = left + LETTER * len(words)


def _curve(series: Series, across: Scale, up: Scale) -> Iterator[str]:
    points = thin(series.points)
    colour = f"c{series.colour % len(_COLOURS)}"
    kind = f"curve {colour}{' faint' if series.faint else ''}"
    for part in _unbroken(points):
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in part)
        yield f'<polyline class="{kind}" style="fill:none" points="{path}"/>'
    if series.dots:
        for x, y in points:
            if drawable(y):
                yield f'<circle class="{colour}" cx="{across(x):.1f}" cy="{up(y):.1f}" r="3"/>'
    for x, y in points:
        if not drawable(y):
            words = f"✕ beyond {LIMIT:g}" if math.isfinite(y) else "✕ not finite"
            half = LETTER * len(words) / 2
            middle = min(max(across(x), across.start + half), across.end - half)
            yield label(middle, HEIGHT - BOTTOM - 6, words, "middle")


def _area(band: Band, across: Scale, up: Scale) -> Iterator[str]:
    step = max(1, len(band.points) // BINS)
    kept = [point for point in band.points[::step] if drawable(point[1]) and drawable(point[2])]
    if len(kept) > 1:
        upper = [f"{across(x):.1f},{up(high):.1f}" for x, _, high in kept]
        lower = [f"{across(x):.1f},{up(low):.1f}" for x, low, _ in reversed(kept)]
        corners = " ".join([*upper, *lower])
        yield f'<polygon class="band c{band.colour % len(_COLOURS)}" points="{corners}"/>'


def _unbroken(points: Sequence[Point]) -> Iterator[list[Point]]:
    """Stretches between the points that are not finite."""
    part: list[Point] = []
    for point in points:
        if drawable(point[1]):
            part.append(point)
        elif part:
            yield part
            part = []
    if part:
        yield part


def _legend(series: Sequence[Series], width: int) -> tuple[list[str], int]:
    """The names of the curves in as many rows as they need, and the number of rows."""
    room = min(width - LEFT - _SAMPLE, LETTER * _LONGEST_NAME)
    named = [(one, shortened(one.name, room)) for one in series if one.name]
    places = flow([_SAMPLE + 20 + LETTER * len(name) for _, name in named], width + 20)
    drawn: list[str] = []
    for (one, name), (x, row) in zip(named, places, strict=True):
        y, kind = 44 + LINE * row, f"c{one.colour % len(_COLOURS)}"
        faint = " faint" if one.faint else ""
        drawn.append(f'<line class="curve {kind}{faint}" x1="{x:.1f}" x2="{x + 20:.1f}" y1="{y}" y2="{y}"/>')
        if one.dots:
            drawn.append(f'<circle class="{kind}" cx="{x + 10:.1f}" cy="{y}" r="3"/>')
        drawn.append(label(x + _SAMPLE, y + 4, name, "start"))
    return drawn, max((row for _, row in places), default=0) + 1


def _text(words: str) -> str:
    return escape(visible(words))
