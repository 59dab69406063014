"""The graph of what came from what: statements in, nodes and edges out. Nothing here touches a file.

Nodes are runs, launches (each first start and each resume), checkpoints, data sets, tokenizers and code. An
edge leads from what was there first to what came of it:

    run → launch           launched        checkpoint → checkpoint   parent
    data set → launch      read            checkpoint → launch       resumed from, or skipped by it
    tokenizer → launch     used            launch → checkpoint       saved
    code → launch          ran             checkpoint → launch       began: another run's weights
    checkpoint → export    exported         corpus → data set, tokenizer    prepared

A parent, a start or a skipped checkpoint that is not among the members becomes a node that is ``absent``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from harness.errors import visible
from harness.format import layout, strict_json
from harness.provenance.corpora import CorpusStatement
from harness.provenance.exports import ExportStatement
from harness.provenance.statements import CheckpointStatement

NodeKind = Literal["run", "launch", "checkpoint", "dataset", "tokenizer", "code", "export", "corpus"]
EdgeKind = Literal[
    "launched",
    "saved",
    "parent",
    "resumed",
    "skipped",
    "began",
    "read",
    "used",
    "ran",
    "exported",
    "prepared",
]
State = Literal["", "complete", "pruned", "nonfinite", "damaged", "elsewhere", "absent", "unreadable"]

_SIDE: tuple[State, ...] = ("nonfinite", "damaged", "unreadable")


@dataclass(frozen=True)
class Member:
    """A checkpoint folder: its name, what that says it is, and what its statement says."""

    name: str
    state: State
    statement: CheckpointStatement


@dataclass(frozen=True)
class Unreadable:
    """A checkpoint folder whose statement cannot be used, and why."""

    name: str
    reason: str
    state: State = "unreadable"


@dataclass(frozen=True)
class Export:
    """A folder that was exported from a checkpoint."""

    name: str
    statement: ExportStatement


@dataclass(frozen=True)
class Corpus:
    """A folder that `harness prepare` made."""

    name: str
    statement: CorpusStatement


@dataclass(frozen=True)
class Node:
    """A thing in the story."""

    key: str
    """Distinct in its graph; of no meaning outside."""
    kind: NodeKind
    title: str
    state: State = ""
    """Of a checkpoint; empty for all else."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Plain JSON values."""

    @property
    def aside(self) -> bool:
        """Whether it is a checkpoint that no lineage continues from."""
        return self.state in _SIDE


@dataclass(frozen=True)
class Edge:
    """``target`` came of ``source``."""

    source: str
    target: str
    kind: EdgeKind
    note: str = ""


@dataclass(frozen=True)
class Graph:
    """Nodes in order of first mention, edges between them."""

    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]

    def of_kind(self, kind: NodeKind) -> list[Node]:
        """The nodes of one kind."""
        return [node for node in self.nodes if node.kind == kind]

    def by_key(self) -> dict[str, Node]:
        """Every node by its key."""
        return {node.key: node for node in self.nodes}


def graph(
    members: Sequence[Member],
    unreadable: Sequence[Unreadable] = (),
    exports: Sequence[Export] = (),
    corpora: Sequence[Corpus] = (),
) -> Graph:
    """The graph of ``members``, whatever runs they belong to, of the ``exports`` made of them and the
    ``corpora`` that they read; each of ``unreadable`` is a node too.
    """
    builder = _Builder(several=len({member.statement.run_id for member in members}) > 1)
    ordered = sorted(members, key=lambda each: (each.statement.sequence, each.statement.step_to, each.name))
    for member in ordered:
        builder.add_checkpoint(member)
    for folder in unreadable:
        builder.add(_unreadable(folder))
    for member in ordered:
        builder.connect(member)
    for export in exports:
        builder.add_export(export)
    for corpus in corpora:
        builder.add_corpus(corpus)
    return Graph(tuple(builder.nodes.values()), tuple(dict.fromkeys(builder.edges)))


def _key(kind: NodeKind, value: Any) -> str:
    """A key that only equal values share."""
    return f"{kind}:{hashlib.sha256(strict_json.dumps(value)).hexdigest()[:16]}"


def _unreadable(folder: Unreadable) -> Node:
    name = visible(folder.name)  # a stranger's, which need not be Unicode
    key = _key("checkpoint", name)
    return Node(key, "checkpoint", name, folder.state, {"name": name, "reason": folder.reason})


class _Builder:
    """Collects nodes once each."""

    def __init__(self, *, several: bool) -> None:
        """``several``: whether there is more than one run, so that a step alone names no checkpoint."""
        self.nodes: dict[str, Node] = {}
        self.edges: list[Edge] = []
        self._several = several
        # Twin runs have checkpoints of one id, so the run is a part of every name.
        self._by_id: dict[tuple[str, str], str] = {}
        """Run id and checkpoint id → key of the folder that a lineage continues from."""
        self._aside: dict[tuple[str, str], str] = {}
        """Run id and checkpoint id → key of a folder that was set aside."""

    def add(self, node: Node) -> str:
        """Add ``node`` unless it is known; returns its key."""
        self.nodes.setdefault(node.key, node)
        return node.key

    def add_checkpoint(self, member: Member) -> None:
        """The node of a member. A step that was trained again may have the id of the damaged one."""
        node = _checkpoint(member, several=self._several)
        self.add(node)
        known = self._aside if node.aside else self._by_id
        known.setdefault((member.statement.run_id, member.statement.subject_id), node.key)

    def add_export(self, export: Export) -> None:
        """The node of an export, and the edges from what it was made of, which may not be here."""
        statement = export.statement
        facts = {"id": statement.subject_id, "name": export.name, **statement.predicate}
        key = _key("export", [statement.subject_id, export.name])
        node = self.add(Node(key, "export", export.name, facts=facts))
        weights = statement.predicate.get("merge", {}).get("weights", [""])
        for source, weight in zip(statement.sources, weights, strict=True):
            title = f"{source['name']} step {source['step']}"
            found = self._find(source["run"], source["checkpoint"], source["step"], title)
            self.edges.append(Edge(found, node, "exported", f"weight {weight}" if weight else ""))

    def add_corpus(self, corpus: Corpus) -> None:
        """The node of a prepared corpus, and edges to the data set and the tokenizer that came of it, where a
        run has read them."""
        statement = corpus.statement
        facts = {"id": statement.subject_id, "name": corpus.name, **statement.predicate}
        node = self.add(Node(_key("corpus", statement.subject_id), "corpus", statement.name, facts=facts))
        made = {"dataset": statement.subject_id, "tokenizer": statement.predicate["tokenizer"]["sha256"]}
        for other in tuple(self.nodes.values()):
            if other.kind in made and other.facts["sha256"] == made[other.kind]:
                self.edges.append(Edge(node, other.key, "prepared"))

    def connect(self, member: Member) -> None:
        """The edges of a member, with the nodes that only its statement names."""
        statement, facts = member.statement, member.statement.predicate
        key = _checkpoint(member, several=self._several).key
        launch = self._launch(statement)
        self.edges.append(Edge(launch, key, "saved"))
        if statement.parent_id is not None:
            parent = self._find(statement.run_id, statement.parent_id, statement.parent_step or 0)
            self.edges.append(Edge(parent, key, "parent"))
        for source, kind in _ingredients(facts):
            self.edges.append(Edge(self.add(source), launch, kind))

    def _launch(self, statement: CheckpointStatement) -> str:
        node = _launch(statement)
        if node.key in self.nodes:
            return node.key
        run = statement.predicate["run"]
        self.edges.append(Edge(self.add(_run(run)), self.add(node), "launched"))
        source = statement.segment["resumed_from"]
        if source is not None:
            found = self._find(statement.run_id, source["checkpoint"], source["step"])
            self.edges.append(Edge(found, node.key, "resumed"))
        elif statement.start is not None:
            self.edges.append(Edge(self._began(statement.start), node.key, "began"))
        for item in statement.segment["skipped"]:
            skipped = self._skipped(statement.run_id, item)
            self.edges.append(Edge(skipped, node.key, "skipped", item["reason"]))
        return node.key

    def _find(self, run: str, identity: str, step: int, title: str | None = None) -> str:
        """The key of the checkpoint ``identity`` of ``run``, which may not be here."""
        known = self._by_id.get((run, identity)) or self._aside.get((run, identity))
        if known is not None:
            return known
        facts = {"id": identity, "run": run, "step": step}
        key = _key("checkpoint", [run, identity])
        return self.add(Node(key, "checkpoint", title or f"step {step}", "absent", facts))

    def _began(self, start: Mapping[str, Any]) -> str:
        """The checkpoint of another run that a run began with."""
        title = f"{start['name']} step {start['step']}"
        return self._find(start["run"], start["checkpoint"], start["step"], title)

    def _skipped(self, run: str, item: Mapping[str, Any]) -> str:
        """The folder that a resume skipped and set aside: by its id, else by its name."""
        identity, name = item["checkpoint"], item["name"]
        if identity is not None and (run, identity) in self._aside:
            return self._aside[run, identity]
        prefix = f"{layout.DAMAGED}{name}-"
        for node in self.nodes.values():
            own = node.facts.get("run", run) == run
            if own and node.state in _SIDE and str(node.facts["name"]).startswith(prefix):
                return node.key
        facts = {"id": identity, "run": run, "name": name, "reason": item["reason"]}
        return self.add(Node(_key("checkpoint", [run, name, identity]), "checkpoint", name, "absent", facts))


def _checkpoint(member: Member, *, several: bool) -> Node:
    statement, facts = member.statement, member.statement.predicate
    # A folder that was set aside is known by its name, since its id may be that of its replacement.
    title = member.name if member.state in _SIDE else f"step {statement.step_to}"
    title = f"{statement.run_name} {title}" if several else title
    shown = {
        "id": statement.subject_id,
        "name": member.name,
        "run": statement.run_id,
        "step": statement.step_to,
        "sequence": statement.sequence,
        "created": facts["created"],
        "loss": facts["metrics"]["loss"],
        "evaluation": facts["metrics"]["evaluation"],
        "state": facts["state"]["sha256"],
    }
    key = _key("checkpoint", [statement.run_id, member.name])
    return Node(key, "checkpoint", title, member.state, shown)


def _launch(statement: CheckpointStatement) -> Node:
    """Launches of one number can be two, when nothing that the first saved could be used."""
    facts, segment = statement.predicate, statement.segment
    launch = {
        name: facts["launch"][name] for name in ("launcher", "world_size", "nodes", "precision", "parallel")
    }
    key = _key("launch", [statement.run_id, segment, launch])
    shown = {"run": statement.run_id, **segment, "start": statement.start, "launch": launch}
    return Node(key, "launch", f"launch {segment['number']}", facts=shown)


def _run(run: Mapping[str, Any]) -> Node:
    return Node(_key("run", run["id"]), "run", run["name"], facts=dict(run))


def _ingredients(facts: Mapping[str, Any]) -> Iterator[tuple[Node, EdgeKind]]:
    data, code = facts["data"], facts["code"]
    corpus = {"kind": data["kind"], "sha256": data["corpus_sha256"], "counts": data["counts"]}
    yield Node(_key("dataset", corpus), "dataset", data["kind"], facts=corpus), "read"
    if data["tokenizer_sha256"] is not None:
        tokenizer = {"sha256": data["tokenizer_sha256"]}
        yield Node(_key("tokenizer", tokenizer), "tokenizer", "tokenizer", facts=tokenizer), "used"
    yield Node(_key("code", code), "code", f"harness {code['harness']}", facts=dict(code)), "ran"
