"""Long stretches of a lineage in which nothing else happened, each as one node: the rest can be looked at."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence, Set

from harness.audit.lineage import cards
from harness.audit.lineage.picture import Picture
from harness.provenance.lineage import Edge, EdgeKind, Graph, Node, State
from harness.words import counted

MOST = 20
"""Checkpoints of a stretch that are drawn one by one."""
_ENDS = 3
"""Of those of a longer stretch, at either end."""
_TOLD = ("step", "loss", "created")
"""What a node for many tells of the first and of the last."""


def folded(picture: Picture) -> Picture:
    """``picture`` with the middle of each long stretch as one node, and a note of how many it leaves out.

    In a stretch each checkpoint follows the one before, both were saved by one launch and are of one state,
    nothing else came of them, and nothing was found against them.
    """
    graph = picture.graph
    stretches = [each[_ENDS:-_ENDS] for each in _stretches(graph, cards.bad(picture))]
    if not stretches:
        return picture
    stands_for = {node.key: fold for each in stretches for fold in [_fold(each)] for node in each}
    drawn = (stands_for.get(node.key, node) for node in graph.nodes)
    nodes = {node.key: node for node in drawn}
    edges = dict.fromkeys(_moved(edge, stands_for) for edge in graph.edges)
    kept = tuple(edge for edge in edges if edge.source != edge.target)
    what = f"{counted(len(stands_for), 'checkpoint')} between which nothing else happened"
    note = f"{what} are drawn as {counted(len(stretches), 'node')}; --every draws each"
    return dataclasses.replace(
        picture, graph=Graph(tuple(nodes.values()), kept), notes=(*picture.notes, note)
    )


def _stretches(graph: Graph, bad: Set[str]) -> list[list[Node]]:
    """Those of more than `MOST` checkpoints, each oldest first."""
    into: dict[str, dict[EdgeKind, str]] = defaultdict(dict)
    kinds: dict[str, list[str]] = defaultdict(list)
    for edge in graph.edges:
        into[edge.target][edge.kind] = edge.source
        kinds[edge.target].append(f"{edge.kind} it")
        kinds[edge.source].append(f"it {edge.kind}")

    def is_plain(node: Node) -> bool:
        return node.key not in bad and sorted(kinds[node.key]) == ["it parent", "parent it", "saved it"]

    # By the key of its last checkpoint, its state and its launch.
    stretches: dict[tuple[str, State, str], list[Node]] = {}
    for node in filter(is_plain, graph.of_kind("checkpoint")):
        parent, launch = into[node.key]["parent"], into[node.key]["saved"]
        stretch = stretches.pop((parent, node.state, launch), [])
        stretch.append(node)
        stretches[node.key, node.state, launch] = stretch
    return [each for each in stretches.values() if len(each) > MOST]


def _fold(stretch: Sequence[Node]) -> Node:
    """One node in the place of ``stretch``."""
    first, last = stretch[0], stretch[-1]
    facts = {
        "run": last.facts["run"],
        "checkpoints": len(stretch),
        "step": last.facts["step"],
        "sequence": last.facts["sequence"],
        **{
            f"{end} {name}": node.facts[name]
            for name in _TOLD
            for end, node in (("first", first), ("last", last))
        },
    }
    return Node(
        f"fold:{first.key}", "checkpoint", f"{first.title} to {last.facts['step']}", last.state, facts
    )


def _moved(edge: Edge, stands_for: Mapping[str, Node]) -> Edge:
    """``edge`` from and to what stands for its ends."""
    source, target = (stands_for[key].key if key in stands_for else key for key in (edge.source, edge.target))
    return dataclasses.replace(edge, source=source, target=target)
