"""Where each checkpoint of a lineage goes: one a row, newest first, in lanes as in `git log --graph`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from harness.provenance.lineage import Graph, Node


@dataclass(frozen=True)
class Row:
    """One checkpoint."""

    node: Node
    lane: int
    open_lanes: tuple[bool, ...]
    """Which lanes run through this row or end in it, before lanes merge."""
    merged: tuple[int, ...]
    """Lanes that end in this row and come from the right, rightmost first."""
    after: tuple[bool, ...]
    """Which lanes go on below."""
    launch: Node | None
    """The launch that begins with this checkpoint; None when its parent is of the same launch."""


def rows(graph: Graph) -> list[Row]:
    """Every checkpoint that has a parent, a child or a launch, newest first."""
    return list(_walk(graph, _ordered(graph)))


def lonely(graph: Graph) -> list[Node]:
    """Checkpoints of which nothing is known but a name: in no row."""
    connected = _connected(graph)
    return [node for node in graph.of_kind("checkpoint") if node.key not in connected]


def _connected(graph: Graph) -> set[str]:
    ends = (edge for edge in graph.edges if edge.kind in ("parent", "saved", "began", "exported"))
    return {end for edge in ends for end in (edge.source, edge.target)}


def _ordered(graph: Graph) -> list[Node]:
    """Newest first; what was set aside before what replaced it, parents that are not here last."""
    connected = _connected(graph)
    nodes = [node for node in graph.of_kind("checkpoint") if node.key in connected]

    generations = _generations(graph)
    runs = list(generations)

    def age(node: Node) -> tuple[bool, int, int, int, bool, str]:
        run = str(node.facts.get("run"))
        sequence = -int(node.facts.get("sequence", 0))
        place = (-generations.get(run, 0), runs.index(run) if run in generations else len(runs))
        return (node.state == "absent", *place, sequence, not node.aside, node.title)

    return sorted(nodes, key=age)


def _generations(graph: Graph) -> dict[str, int]:
    """Run id → how many runs it descends from, one after the other, as far as the graph tells."""
    nodes = graph.by_key()
    parents = {
        str(nodes[edge.target].facts["run"]): str(nodes[edge.source].facts["run"])
        for edge in graph.edges
        if edge.kind == "began"
    }
    generations: dict[str, int] = {}
    for launch in graph.of_kind("launch"):
        run = str(launch.facts["run"])
        line = [run]
        # Claims that nobody has signed may form a ring.
        while line[-1] in parents and parents[line[-1]] not in line:
            line.append(parents[line[-1]])
        generations[run] = len(line) - 1
    return generations


def _walk(graph: Graph, ordered: list[Node]) -> Iterator[Row]:
    main = next((node.key for node in ordered if not node.aside), None)
    # A lane is the key of the checkpoint that it leads down to; None is a free one.
    lanes: list[str | None] = [main]
    parents = {edge.target: edge.source for edge in graph.edges if edge.kind == "parent"}
    launches = {edge.target: edge.source for edge in graph.edges if edge.kind == "saved"}
    began = {edge.target: edge.source for edge in graph.edges if edge.kind == "began"}
    nodes = graph.by_key()
    for node in ordered:
        waiting = [number for number, key in enumerate(lanes) if key == node.key]
        lane, merged = (waiting[0], waiting[:0:-1]) if waiting else (_free(lanes), [])
        lanes[lane] = node.key
        before = tuple(key is not None for key in lanes)
        for number in merged:
            lanes[number] = None
        parent = parents.get(node.key) or began.get(launches.get(node.key, ""))
        lanes[lane] = parent
        while len(lanes) > 1 and lanes[-1] is None:
            lanes.pop()
        launch = launches.get(node.key)
        begins = launch is not None and (parent is None or launches.get(parent) != launch)
        yield Row(
            node,
            lane,
            before,
            tuple(merged),
            tuple(key is not None for key in lanes),
            nodes[launch] if begins and launch is not None else None,
        )


def _free(lanes: list[str | None]) -> int:
    """The first free lane, made when there is none."""
    if None not in lanes:
        lanes.append(None)
    return lanes.index(None)
