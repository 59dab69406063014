"""A lineage as text, newest checkpoint first, and as a Mermaid flowchart (mermaid.js.org/syntax)."""

from __future__ import annotations

from collections.abc import Iterator

from harness.audit.lineage import words
from harness.audit.lineage.picture import Picture
from harness.audit.lineage.rows import Row, lonely, rows
from harness.errors import visible
from harness.provenance.lineage import Edge, Graph, Node, State
from harness.terminal import Style, style

_LABEL = 10
_MARKS: dict[State, tuple[str, Style]] = {
    "complete": ("*", "green"),
    "elsewhere": ("*", "green"),
    "pruned": ("o", "dim"),
    "nonfinite": ("x", "red"),
    "damaged": ("x", "red"),
    "unreadable": ("x", "red"),
    "absent": ("?", "yellow"),
}
_SHAPES = {
    "run": ("([", "])"),
    "launch": ("{{", "}}"),
    "checkpoint": ("[", "]"),
    "dataset": ("[(", ")]"),
    "tokenizer": ("[(", ")]"),
    "code": ("[/", "/]"),
    "export": ("([", "])"),
    "corpus": ("[(", ")]"),
}
_CLASSES = {
    "pruned": "stroke-dasharray:4 3",
    "nonfinite": "stroke:#cf222e,stroke-width:2px",
    "damaged": "stroke:#cf222e,stroke-width:2px",
    "unreadable": "stroke:#cf222e,stroke-width:2px",
    "absent": "stroke:#9a6700,stroke-dasharray:2 2",
}


def text(picture: Picture) -> str:
    """The tree for a terminal."""
    trust: Style = "green" if picture.verified else "red" if picture.exit_code == 1 else "yellow"
    graph = picture.graph
    lines = [style(picture.trust, trust), *_header(graph), ""]
    for row in rows(graph):
        lines += _row(row, graph)
    for node in lonely(graph):
        lines.append(f"{_mark(node)} {visible('  '.join([node.title, *words.checkpoint(node)]))}")
    lines += [f"note      {visible(note)}" for note in picture.notes]
    return "\n".join([*lines, *(f"{style('wrong', 'red')}     {each}" for each in picture.findings)])


def _header(graph: Graph) -> Iterator[str]:
    names = words.numbered(graph)
    for node in graph.nodes:
        label = names.get(node.key)
        if node.kind == "run":
            yield _line("run", words.run(node))
        elif node.kind == "dataset":
            yield _line(label or "data", words.dataset(node))
        elif node.kind == "tokenizer":
            yield _line(label or "tokenizer", words.tokenizer(node))
        elif node.kind == "export":
            yield _line("export", words.export(node))
        elif node.kind == "corpus":
            yield _line("corpus", words.corpus(node))
        elif node.kind == "code":
            yield _line(label or "code", words.code(node))


def _line(label: str, shown: str) -> str:
    return f"{label.ljust(_LABEL)}{visible(shown)}"


def _row(row: Row, graph: Graph) -> Iterator[str]:
    lanes = row.open_lanes
    for number, lane in enumerate(row.merged):
        yield _merge(row.lane, lane, [*_without(lanes, row.merged[:number])])
        lanes = tuple(_without(lanes, row.merged[: number + 1]))
    marks = ["|" if each else " " for each in lanes]
    marks[row.lane] = _mark(row.node)
    title = style(visible(row.node.title), "bold")
    yield f"{' '.join(marks).rstrip()} {title}  {visible('  '.join(words.checkpoint(row.node)))}"
    if row.launch is not None:
        below = " ".join("|" if each else " " for each in row.after)
        heading, how, *others = words.launch(row.launch, graph, words.numbered(graph))
        for number, line in enumerate([f"{heading}, {how}", *others]):
            yield f"{below}   {'  ' if number else ''}{style(visible(line), 'dim')}".rstrip()


def _without(lanes: tuple[bool, ...], ended: tuple[int, ...]) -> Iterator[bool]:
    return (each and number not in ended for number, each in enumerate(lanes))


def _merge(into: int, lane: int, lanes: list[bool]) -> str:
    """``|/`` or ``|_|/``: lane ``lane`` bends to the left."""
    marks = list(" ".join("|" if each and number != lane else " " for number, each in enumerate(lanes)))
    for place in range(2 * into + 1, 2 * lane - 1):
        marks[place] = "_" if marks[place] == " " else marks[place]
    marks[2 * lane - 1] = "/"
    return "".join(marks).rstrip()


def _mark(node: Node) -> str:
    mark, colour = _MARKS[node.state]
    return style(mark, colour)


def mermaid(picture: Picture) -> str:
    """The graph as a Mermaid flowchart; labels hold nothing that Mermaid or HTML could take for syntax."""
    graph = picture.graph
    keys = {node.key: f"n{number}" for number, node in enumerate(graph.nodes)}
    lines = ["flowchart TB", f"  %% {_comment(picture.trust)}"]
    lines += [f"  {keys[node.key]}{_box(node, graph)}" for node in graph.nodes]
    lines += [f"  {_arrow(edge, keys)}" for edge in graph.edges]
    for state, look in _CLASSES.items():
        members = [keys[node.key] for node in graph.nodes if node.state == state]
        if members:
            lines += [f"  classDef {state} {look}", f"  class {','.join(members)} {state}"]
    return "\n".join(lines)


def _box(node: Node, graph: Graph) -> str:
    opening, closing = _SHAPES[node.kind]
    if node.kind == "launch":
        parts = words.launch(node, graph, {})
    elif node.kind == "checkpoint":
        parts = [node.title, *words.checkpoint(node)]
    else:
        parts = [f"{node.kind}: {words.ingredient(node)}"]
    return f'{opening}"{"<br/>".join(map(_escape, parts))}"{closing}'


def _arrow(edge: Edge, keys: dict[str, str]) -> str:
    source, target = keys[edge.source], keys[edge.target]
    if edge.kind == "parent":
        return f"{source} ==> {target}"
    if edge.kind in ("resumed", "skipped", "began"):
        return f'{source} -. "{edge.kind}" .-> {target}'
    return f"{source} --> {target}"


def _escape(value: str) -> str:
    """Letters, digits and a few signs as they are, all else as Mermaid's decimal entity ``#NN;``."""
    plain = " .,:+-_=…→"
    return "".join(
        each if (each.isalnum() and each.isprintable()) or each in plain else f"#{ord(each)};"
        for each in value
    )


def _comment(value: str) -> str:
    # A comment ends with its line, and braces after %% would be a directive.
    return visible(value).replace("{", "(").replace("}", ")")
