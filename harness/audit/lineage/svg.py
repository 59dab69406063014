"""The drawing of a lineage: an inline SVG, every node a link to its card. No string gets in unescaped."""

from __future__ import annotations

import textwrap
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from html import escape

from harness.audit.lineage import words
from harness.audit.lineage.rows import Row, lonely, rows
from harness.errors import visible
from harness.provenance.lineage import Graph, Node

# Pixels.
_ROW = 46
_LINE = 17
_LANE = 30
_BOX = 290
_GAP = 50
_TOP = 14
_EDGE = 4
_ASIDE = 30
_SMALLEST = 0.8
"""Share of its size to which a drawing may shrink."""
_TEXT = 300
"""Width of what stands beside a checkpoint: with its lane on the first screen of a phone."""
_CHARACTERS = 38
"""What fits into a line of a box at 12 pixels, in a wide font."""
_LINES = 3
"""Over how many lines of a box a text goes on; the whole of it is in the box's title."""


@dataclass(frozen=True)
class Box:
    """A labelled rectangle."""

    node: Node
    x: float
    y: float
    told: tuple[str, ...]
    """The name, and what is said of it."""

    @cached_property
    def lines(self) -> list[str]:
        """``told`` as it fits."""
        return [line for each in self.told for line in _wrapped(visible(each))]

    @property
    def height(self) -> float:
        """Pixels."""
        return 12 + _LINE * len(self.lines)

    @property
    def middle(self) -> float:
        """The y of its middle."""
        return self.y + self.height / 2


def svg(graph: Graph, anchors: Mapping[str, str], bad: Container[str], *, narrow: bool = False) -> str:
    """Checkpoints on the left with the newest on top, then launches, then ingredients and exports; one below
    the other in a ``narrow`` one.

    ``anchors``: key of a node → id of its card; ``bad``: keys of nodes that something was found against.
    """
    walked = rows(graph)
    alone = lonely(graph)
    lanes = max((len(row.open_lanes) for row in walked), default=1)
    points = {row.node.key: (_lane_x(row.lane), _row_y(number)) for number, row in enumerate(walked)}
    points |= {node.key: (_lane_x(0), _row_y(len(walked) + number)) for number, node in enumerate(alone)}
    below = _TOP + _ROW * (len(walked) + len(alone))
    left, top = (_EDGE, below + _TOP) if narrow else (_lane_x(lanes) + _GAP, float(_TOP))
    launches = _launch_boxes(walked, graph, left, top)
    right = left if narrow else left + _BOX + _GAP
    under = max([top, *(box.y + box.height + _TOP for box in launches)]) if narrow else top
    others = [node for node in graph.nodes if node.kind not in ("checkpoint", "launch")]
    boxes = {box.node.key: box for box in (*launches, *_stack(others, right, under))}
    height = max([below, *(box.y + box.height + _TOP for box in boxes.values())])
    width = _lane_x(lanes) + _EDGE if narrow else right + _BOX + _ASIDE
    # A narrow one shrinks to a phone's width as long as its letters can be read.
    style = f' style="max-width:max(100%,{_SMALLEST * width:.0f}px);height:auto"' if narrow else ""
    shapes = list(_edges(graph, boxes, points))
    drawn = [(row.node, _point(row.node, points)) for row in walked]
    drawn += [(node, _point(node, points)) for node in alone]
    drawn += [(box.node, _box(box)) for box in boxes.values()]
    for node, parts in drawn:
        look = "node bad" if node.key in bad else "node"
        shapes += [f'<a class="{look}" href="#{anchors[node.key]}">', *parts, "</a>"]
    label = "Graph of checkpoints, launches, data and code; each is a link to its details"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" aria-label="{label}"{style} width="{width:.0f}" '
        f'height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}">\n' + "\n".join(shapes) + "\n</svg>"
    )


def _lane_x(lane: int) -> float:
    return _TEXT + _LANE * lane + 14


def _row_y(number: int) -> float:
    return _TOP + _ROW * (number + 0.5)


def _launch_boxes(walked: list[Row], graph: Graph, x: float, top: float) -> list[Box]:
    """Each launch beside the checkpoint that it began with, moved down where it would hide another one or lie
    above ``top``."""
    boxes: list[Box] = []
    lowest = top
    names = words.numbered(graph)
    for number, row in enumerate(walked):
        if row.launch is not None and all(box.node != row.launch for box in boxes):
            box = Box(row.launch, x, 0.0, tuple(words.launch(row.launch, graph, names)))
            boxes.append(replace(box, y=max(lowest, _row_y(number) - box.height / 2)))
            lowest = boxes[-1].y + box.height + 8
    return boxes


def _stack(nodes: list[Node], x: float, y: float) -> list[Box]:
    boxes: list[Box] = []
    for node in nodes:
        boxes.append(Box(node, x, y, (node.kind, *_ingredient(node))))
        y += boxes[-1].height + 10
    return boxes


def _ingredient(node: Node) -> list[str]:
    return words.ingredient(node).replace("; ", "  ").split("  ")


def _edges(graph: Graph, boxes: dict[str, Box], points: dict[str, tuple[float, float]]) -> Iterator[str]:
    for start, first in _births(graph):
        if start in points and first in points:
            yield _curve(points[start], points[first], "path began", upright=True)
    for edge in graph.edges:
        if edge.kind == "parent":
            yield _curve(points[edge.source], points[edge.target], "path", upright=True)
        elif (
            edge.kind in ("resumed", "skipped", "began", "exported")
            and edge.source in points
            and edge.target in boxes
        ):
            x, y = _side(boxes[edge.target], points[edge.source])
            yield _curve((x, y + 5), points[edge.source], f"path {edge.kind}")
        elif edge.kind == "saved" and edge.source in boxes:
            yield _curve(_side(boxes[edge.source], points[edge.target]), points[edge.target], "path used")
        elif edge.source in boxes and edge.target in boxes:
            yield _curve(*_between(boxes[edge.source], boxes[edge.target]), "path used")


def _side(box: Box, point: tuple[float, float]) -> tuple[float, float]:
    """The middle of the side of ``box`` that is nearer to ``point``."""
    return (box.x if point[0] < box.x else box.x + _BOX), box.middle


def _between(source: Box, target: Box) -> tuple[tuple[float, float], tuple[float, float]]:
    if source.x == target.x:  # a corpus and the data set that came of it, or all boxes of a narrow drawing
        return (source.x + _BOX, source.middle), (target.x + _BOX, target.middle)
    return (source.x, source.middle), (target.x + _BOX, target.middle)


def _births(graph: Graph) -> Iterator[tuple[str, str]]:
    """The checkpoint that a run began with, and the run's first one."""
    followers = {edge.target for edge in graph.edges if edge.kind == "parent"}
    for began in graph.edges:
        for saved in graph.edges if began.kind == "began" else ():
            if saved.kind == "saved" and saved.source == began.target and saved.target not in followers:
                yield began.source, saved.target


def _curve(start: tuple[float, float], end: tuple[float, float], look: str, *, upright: bool = False) -> str:
    (x1, y1), (x2, y2) = start, end
    bend_x, bend_y = (0.0, (y2 - y1) / 2) if upright else ((x2 - x1) / 2, 0.0)
    # Between two boxes of one column the curve leaves it, else it would lie on the boxes between.
    aside = _ASIDE if x1 == x2 and not upright else 0.0
    return (
        f'<path class="{look}" d="M{x1:.1f},{y1:.1f} C{x1 + bend_x + aside:.1f},{y1 + bend_y:.1f} '
        f'{x2 - bend_x + aside:.1f},{y2 - bend_y:.1f} {x2:.1f},{y2:.1f}"/>'
    )


def _box(box: Box) -> Iterator[str]:
    look = "box launch" if box.node.kind == "launch" else "box"
    yield (
        f'<title>{_text(" ".join(box.told))}</title><rect class="{look}" x="{box.x}" y="{box.y:.1f}" '
        f'width="{_BOX}" height="{box.height:.1f}" rx="6"/>'
    )
    for number, line in enumerate(box.lines):
        look = "soft" if number else "name"
        y = box.y + 6 + _LINE * (number + 0.75)
        yield f'<text class="{look}" x="{box.x + 10:.1f}" y="{y:.1f}">{escape(line)}</text>'


def _point(node: Node, points: Mapping[str, tuple[float, float]]) -> Iterator[str]:
    x, y = points[node.key]
    facts, told = node.facts, words.checkpoint(node)
    shown = [each for each in told if each != facts.get("created")]  # the day is in the card
    yield f"<title>{_text('  '.join([node.title, *told]))}</title>"
    if "checkpoints" in facts:  # a node for many looks like a pile
        for below in (8, 4):
            yield _circle(node, x, y + below)
    yield _circle(node, x, y)
    yield f'<text class="name" x="4" y="{y - 3:.1f}">{_text(_cut(node.title))}</text>'
    second = _cut(" · ".join(shown), _CHARACTERS + 4)
    yield f'<text class="soft" x="4" y="{y + 13:.1f}">{_text(second)}</text>'


def _circle(node: Node, x: float, y: float) -> str:
    return f'<circle class="{node.state}" stroke-width="2.5" cx="{x:.1f}" cy="{y:.1f}" r="8"/>'


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _CHARACTERS, max_lines=_LINES, placeholder="…")


def _text(value: str) -> str:
    return escape(visible(value))


def _cut(value: str, characters: int = _CHARACTERS) -> str:
    return value if len(value) <= characters else f"{value[: characters - 1]}…"
