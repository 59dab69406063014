"""The words for the nodes of a lineage, the same in text, Mermaid and HTML. Nothing is escaped here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from harness.provenance.lineage import Graph, Node
from harness.words import counted

_MOST_CHANGES = 4


def checkpoint(node: Node) -> list[str]:
    """Short facts of a checkpoint, the id first."""
    facts = node.facts
    if "checkpoints" in facts:
        return _stretch(node)
    words = [short(facts.get("id"))] if facts.get("id") else []
    if node.state not in ("complete", "elsewhere"):
        words.append(node.state)
    if facts.get("loss") is not None:
        words.append(f"loss {decimal(facts['loss'])}")
    if facts.get("evaluation"):  # its own loss is another one than that of training
        scores = (f"{name} {decimal(value)}" for name, value in facts["evaluation"].items())
        words.append(f"held out {', '.join(scores)}")
    if facts.get("created"):
        words.append(str(facts["created"]))
    if facts.get("reason"):
        words.append(str(facts["reason"]))
    return words


def _stretch(node: Node) -> list[str]:
    """The same of a node for many (`harness.audit.lineage.fold`)."""
    facts = node.facts
    words = [counted(facts["checkpoints"], "checkpoint")]
    if node.state not in ("complete", "elsewhere"):
        words.append(node.state)
    if None not in (facts["first loss"], facts["last loss"]):
        words.append(f"loss {decimal(facts['first loss'])} to {decimal(facts['last loss'])}")
    return [*words, f"{facts['first created']} to {facts['last created']}"]


def launch(node: Node, graph: Graph, names: Mapping[str, str]) -> list[str]:
    """What began: its class; origin, size and ingredients; then changes, accepted differences, skipped ones.

    ``names``: key → name of data sets, tokenizers and code, where there is more than one to choose from.
    """
    facts = node.facts
    origin = _origin(facts["resumed_from"], facts["start"])
    how = facts["launch"]
    world = f"{how['world_size']} process{'es' * (how['world_size'] != 1)}, {how['precision']}"
    used = [names[edge.source] for edge in graph.edges if edge.target == node.key and edge.source in names]
    lines = [f"{node.title}: {facts['class']}", ", ".join([origin, world, *used])]
    changes = [f"{item['what']} {item['before']} → {item['after']}" for item in facts["differences"]]
    lines += _some("changed", changes)
    lines += _some("accepted", facts["accepted"])
    return lines + _some("skipped", [f"{item['name']} ({item['reason']})" for item in facts["skipped"]])


def _origin(resumed: Mapping[str, Any] | None, start: Mapping[str, Any] | None) -> str:
    if resumed is not None:
        return f"resumed from step {resumed['step']}"
    return "from step 0" if start is None else f"began with weights of {start['name']} step {start['step']}"


def dataset(node: Node) -> str:
    """Kind, counts and digest of a data set."""
    counts = ", ".join(f"{number} {name}" for name, number in node.facts["counts"].items())
    return "  ".join(part for part in (node.title, counts, f"sha256 {short(node.facts['sha256'])}") if part)


def tokenizer(node: Node) -> str:
    """Digest of a tokenizer."""
    return f"sha256 {short(node.facts['sha256'])}"


def code(node: Node) -> str:
    """Version, commit, whether it was clean, and the user's own task."""
    facts = node.facts
    commit = "no git commit" if facts["git_commit"] is None else f"commit {short(facts['git_commit'])}"
    state = {None: "", False: ", clean", True: f", dirty (diff {short(facts['diff_sha256'])})"}[
        facts["dirty"]
    ]
    task = facts["task"]
    own = "" if task is None else f"; task {task['import_path']} {short(task['sha256'])}"
    return f"{node.title}, {commit}{state}{own}"


def export(node: Node) -> str:
    """Layout of an export, the checkpoints that it was made of, and its own id."""
    facts = node.facts
    merge = facts.get("merge", {"others": [], "weights": []})
    sources = [
        f"{source['name']} step {source['step']} {short(source['checkpoint'])}"
        for source in (facts["source"], *merge["others"])
    ]
    merged = f", merged {' : '.join(merge['weights'])}" if merge["others"] else ""
    made = f"{facts['layout']} of {' and '.join(sources)}{merged}"
    return f"{node.title}  {made}  id {short(facts['id'])}"


def ingredient(node: Node) -> str:
    """A node that is no launch and no checkpoint, by its kind."""
    describe = {
        "run": run,
        "dataset": dataset,
        "tokenizer": tokenizer,
        "code": code,
        "export": export,
        "corpus": corpus,
    }
    return describe[node.kind](node)


def corpus(node: Node) -> str:
    """Sources, what was kept, and the id of a prepared corpus."""
    facts = node.facts
    source, documents = facts["source"], facts["documents"]
    made = f"{source['files']} files of kind {source['kind']} {short(source['sha256'])}"
    kept = f"{documents['kept']['documents']} of {documents['read']['documents']} documents kept"
    return f"{node.title}  prepared from {made}  {kept}  id {short(facts['id'])}"


def run(node: Node) -> str:
    """Name, id and seed of a run."""
    return f"{node.title}  {node.facts['id']}  seed {node.facts['seed']}"


def numbered(graph: Graph) -> dict[str, str]:
    """``data 1``, ``data 2``, ``code 1`` … for the ingredients of which there are several."""
    names: dict[str, str] = {}
    for kind, word in (("dataset", "data"), ("tokenizer", "tokenizer"), ("code", "code")):
        nodes = [node for node in graph.nodes if node.kind == kind]
        if len(nodes) > 1:
            names |= {node.key: f"{word} {number}" for number, node in enumerate(nodes, 1)}
    return names


def short(value: str | None) -> str:
    """The beginning of a digest."""
    return "none" if value is None else f"{value[:12]}…"


def decimal(text: str) -> str:
    """A decimal string with at most six digits."""
    return f"{float(text):.6g}"


def _some(word: str, items: Sequence[str]) -> list[str]:
    more = [f"… {len(items) - _MOST_CHANGES} more"] if len(items) > _MOST_CHANGES else []
    return [f"{word} {', '.join([*items[:_MOST_CHANGES], *more])}"] if items else []
