"""A lineage as one HTML page: an inline SVG and a table. No script, nothing loaded, every string escaped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

from harness.audit import lineage_words as words
from harness.audit.lineage import Picture
from harness.audit.lineage_rows import Row, lonely, rows
from harness.provenance.findings import visible
from harness.provenance.lineage import Graph, Node

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_STYLE = """
:root{color-scheme:light dark;--text:#1f2328;--soft:#57606a;--line:#8c959f;--back:#fff;--panel:#f6f8fa;
--edge:#d0d7de;--good:#1a7f37;--bad:#cf222e;--open:#9a6700;--launch:#0969da}
@media(prefers-color-scheme:dark){:root{--text:#e6edf3;--soft:#9da7b1;--line:#6e7681;--back:#0d1117;
--panel:#161b22;--edge:#30363d;--good:#3fb950;--bad:#f85149;--open:#d29922;--launch:#58a6ff}}
body{margin:0;background:var(--back);color:var(--text);
font:15px/1.5 system-ui,"Segoe UI",Helvetica,Arial,sans-serif}
main{max-width:1240px;margin:0 auto;padding:28px 24px 56px}
h1{font-size:24px;margin:0 0 10px}
.status{border-left:4px solid;background:var(--panel);padding:8px 14px;margin:8px 0;border-radius:0 6px 6px 0;
overflow-wrap:anywhere}
.good{border-color:var(--good)}.bad{border-color:var(--bad)}.open{border-color:var(--open)}
.scroll{overflow-x:auto}
svg{display:block;margin:16px 0}
svg text{fill:var(--text);font-size:13px}
svg .soft{fill:var(--soft);font-size:12px}
svg .name{font-weight:600}
svg .path{fill:none;stroke:var(--line);stroke-width:2}
svg .resumed,svg .began{stroke:var(--launch);stroke-dasharray:5 4}
svg .skipped{stroke:var(--bad);stroke-dasharray:2 4}
svg .exported{stroke:var(--good);stroke-dasharray:1 4}
svg .used{stroke:var(--edge);stroke-width:1.5}
svg .box{fill:var(--panel);stroke:var(--edge)}
svg .launch{stroke:var(--launch)}
svg .complete,svg .elsewhere{fill:var(--good);stroke:var(--good)}
svg .pruned{fill:var(--back);stroke:var(--good);stroke-dasharray:3 2}
svg .nonfinite,svg .damaged,svg .unreadable{fill:var(--back);stroke:var(--bad)}
svg .absent{fill:var(--back);stroke:var(--open);stroke-dasharray:2 2}
table{border-collapse:collapse;font-size:13px}
th,td{padding:5px 14px 5px 0;border-bottom:1px solid var(--edge);text-align:left;vertical-align:top}
th{color:var(--soft);font-weight:600}
td{white-space:nowrap}
code{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:12px;overflow-wrap:anywhere}
"""

_LEGEND = (
    "Newest on top. Filled: complete; dashed: pruned, only its signatures are left; red: set aside; yellow: "
    "not here. Blue dashes: resumed from, or began with another run's weights; green dots: exported; "
    "red dots: skipped by a resume. Point at a box for its whole text."
)

_FROM_POINTS = ("resumed", "skipped", "began", "exported")
"""Edges that lead from a checkpoint to a box."""

# Pixels.
_ROW = 46
_LINE = 17
_LANE = 30
_BOX = 280
_GAP = 50
_TOP = 14
_CHARACTERS = 40
"""What fits into a box at 12 pixels; the whole text is in the box's title."""


@dataclass(frozen=True)
class Box:
    """A labelled rectangle."""

    node: Node
    x: float
    y: float
    lines: tuple[str, ...]

    @property
    def height(self) -> float:
        """Pixels."""
        return 12 + _LINE * len(self.lines)

    @property
    def middle(self) -> float:
        """The y of its middle."""
        return self.y + self.height / 2


def render(picture: Picture) -> str:
    """The whole page."""
    title = visible(f"Lineage of {picture.path}")
    state = "good" if picture.verified else "bad" if picture.exit_code == 1 else "open"
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="status {state}">{escape(visible(picture.trust))}</p>',
        *(f'<p class="status bad">{escape(str(each))}</p>' for each in picture.findings),
        *(f'<p class="status open">{escape(visible(note))}</p>' for note in picture.notes),
        f'<div class="scroll">{svg(picture.graph)}</div>',
        f"<p>{_LEGEND}</p>",
        f'<div class="scroll">{_table(picture.graph)}</div>',
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
        "<body><main>\n" + "\n".join(body) + "\n</main></body></html>\n"
    )


def svg(graph: Graph) -> str:
    """Ingredients on the left, launches beside them, checkpoints on the right with the newest on top."""
    walked = rows(graph)
    alone = lonely(graph)
    height_of_rows = _TOP + _ROW * (len(walked) + len(alone))
    launches = _launch_boxes(walked, graph)
    ingredients = _stack([node for node in graph.nodes if node.kind not in ("checkpoint", "launch")])
    lanes = max((len(row.open_lanes) for row in walked), default=1)
    points = {row.node.key: (_lane_x(row.lane), _row_y(number)) for number, row in enumerate(walked)}
    points |= {node.key: (_lane_x(0), _row_y(len(walked) + number)) for number, node in enumerate(alone)}
    boxes = {box.node.key: box for box in (*launches, *ingredients)}
    height = max([height_of_rows, *(box.y + box.height + _TOP for box in boxes.values())])
    width = _lane_x(lanes) + 460
    shapes = [
        *_edges(graph, boxes, points),
        *(part for box in boxes.values() for part in _box(box)),
        *(part for node in graph.of_kind("checkpoint") for part in _point(node, points, _lane_x(lanes))),
    ]
    label = "Graph of checkpoints, launches, data and code"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{label}" width="{width:.0f}" '
        f'height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}">\n' + "\n".join(shapes) + "\n</svg>"
    )


def _lane_x(lane: int) -> float:
    return 2 * (_BOX + _GAP) + _LANE * lane + 10


def _row_y(number: int) -> float:
    return _TOP + _ROW * (number + 0.5)


def _launch_boxes(walked: list[Row], graph: Graph) -> list[Box]:
    """Each launch beside the checkpoint that it began with, moved down where it would hide another one."""
    boxes: list[Box] = []
    lowest = float(_TOP)
    names = words.numbered(graph)
    for number, row in enumerate(walked):
        if row.launch is not None and all(box.node != row.launch for box in boxes):
            lines = tuple(words.launch(row.launch, graph, names))
            y = max(lowest, _row_y(number) - (12 + _LINE * len(lines)) / 2)
            boxes.append(Box(row.launch, _BOX + _GAP, y, lines))
            lowest = y + boxes[-1].height + 8
    return boxes


def _stack(nodes: list[Node]) -> list[Box]:
    boxes: list[Box] = []
    y = float(_TOP)
    for node in nodes:
        boxes.append(Box(node, 1, y, (node.kind, *_ingredient(node))))
        y += boxes[-1].height + 10
    return boxes


def _ingredient(node: Node) -> list[str]:
    describe = {
        "run": words.run,
        "dataset": words.dataset,
        "tokenizer": words.tokenizer,
        "code": words.code,
        "export": words.export,
        "corpus": words.corpus,
    }
    return describe[node.kind](node).replace("; ", "  ").split("  ")


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
            box = boxes[edge.target]
            yield _curve((box.x + _BOX, box.middle + 5), points[edge.source], f"path {edge.kind}")
        elif edge.kind == "saved" and edge.source in boxes:
            box = boxes[edge.source]
            yield _curve((box.x + _BOX, box.middle), points[edge.target], "path used")
        elif edge.source in boxes and edge.target in boxes:
            source, target = boxes[edge.source], boxes[edge.target]
            yield _curve((source.x + _BOX, source.middle), (target.x, target.middle), "path used")


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
    return (
        f'<path class="{look}" d="M{x1:.1f},{y1:.1f} C{x1 + bend_x:.1f},{y1 + bend_y:.1f} '
        f'{x2 - bend_x:.1f},{y2 - bend_y:.1f} {x2:.1f},{y2:.1f}"/>'
    )


def _box(box: Box) -> Iterator[str]:
    look = "box launch" if box.node.kind == "launch" else "box"
    yield (
        f'<g><title>{_text(" ".join(box.lines))}</title><rect class="{look}" x="{box.x}" y="{box.y:.1f}" '
        f'width="{_BOX}" height="{box.height:.1f}" rx="6"/>'
    )
    for number, line in enumerate(box.lines):
        look = "soft" if number else "name"
        y = box.y + 6 + _LINE * (number + 0.75)
        yield f'<text class="{look}" x="{box.x + 10:.1f}" y="{y:.1f}">{_text(_cut(line))}</text>'
    yield "</g>"


def _point(node: Node, points: dict[str, tuple[float, float]], text_x: float) -> Iterator[str]:
    if node.key not in points:
        return
    x, y = points[node.key]
    facts = words.checkpoint(node)
    yield (
        f"<g><title>{_text('  '.join([node.title, *facts]))}</title>"
        f'<circle class="{node.state}" stroke-width="2.5" cx="{x:.1f}" cy="{y:.1f}" r="8"/>'
        f'<text class="name" x="{text_x:.1f}" y="{y - 3:.1f}">{_text(_cut(node.title))}</text>'
        f'<text class="soft" x="{text_x:.1f}" y="{y + 13:.1f}">{_text(_cut("  ".join(facts), 70))}</text></g>'
    )


def _table(graph: Graph) -> str:
    """Every checkpoint with its whole id, for copying."""
    head = "".join(f"<th>{name}</th>" for name in ("checkpoint", "state", "created", "id"))
    lines = []
    several = len(graph.of_kind("run")) > 1  # then the title names the run, and the folder alone does not
    for node in reversed(graph.of_kind("checkpoint")):
        facts = node.facts
        cells = (node.title if several else facts.get("name") or node.title, node.state, facts.get("created"))
        shown = "".join(f"<td>{_text(str(each or ''))}</td>" for each in cells)
        lines.append(f"<tr>{shown}<td><code>{_text(str(facts.get('id') or ''))}</code></td></tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n" + "\n".join(lines) + "\n</tbody></table>"


def _text(value: str) -> str:
    return escape(visible(value))


def _cut(value: str, characters: int = _CHARACTERS) -> str:
    return value if len(value) <= characters else f"{value[: characters - 1]}…"
