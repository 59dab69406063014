"""The details of each node of a lineage as HTML: a card that its link opens, without any script.

A card is shown by `:target`, so that a click, the keyboard, the back button and a link from elsewhere all
work. It says first how far the node can be believed, then what it came of and what came of it, then facts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from pathlib import PurePath
from typing import Any

from harness.audit.lineage.picture import Picture
from harness.errors import visible
from harness.provenance.findings import Finding
from harness.provenance.lineage import Edge, Graph, Node

STYLE = """
.card{display:none}
.card:target{display:block;position:fixed;right:20px;bottom:20px;width:min(460px,calc(100vw - 40px));
max-height:min(78vh,720px);overflow:auto;background:var(--back);border:1px solid var(--edge);
border-radius:10px;box-shadow:0 8px 32px rgba(0,0,0,.28);padding:14px 18px;box-sizing:border-box}
body:has(.card:target) main{padding-bottom:60vh}
.card h2{font-size:17px;margin:0 28px 2px 0;overflow-wrap:anywhere}
.card .kind{color:var(--soft);font-size:13px;margin:0}
.card .close{position:absolute;top:8px;right:14px;font-size:24px;text-decoration:none;color:var(--soft)}
.card dl{display:grid;grid-template-columns:minmax(84px,auto) 1fr;gap:3px 14px;font-size:13px;margin:10px 0}
.card dt{color:var(--soft)}
.card dd{margin:0;overflow-wrap:anywhere}
.card .status{font-size:13px;padding:5px 10px}
.card ul{margin:4px 0;padding-left:18px;font-size:13px}
a{color:var(--launch)}
@media(max-width:640px){.card:target{left:0;right:0;bottom:0;width:100%;max-height:62vh;
border-radius:12px 12px 0 0}}
"""

_BAD = ("damaged", "unreadable", "nonfinite")
_WORDS = {
    "damaged": "set aside by a resume that found it damaged",
    "unreadable": "could not be believed, so nothing that it says is shown",
    "nonfinite": "the last state before a NaN or an infinity; no lineage continues from it",
    "absent": "not here: known only by what names it",
    "pruned": "payload removed; manifest and signatures are left",
}
_EDGES = {
    "parent": ("continued from", "continued by"),
    "saved": ("saved by", "saved"),
    "resumed": ("resumed from", "resumed by"),
    "skipped": ("skipped", "skipped by"),
    "began": ("began with the weights of", "its weights began"),
    "exported": ("exported from", "exported as"),
    "prepared": ("prepared as", "prepared"),
    "read": ("read", "read by"),
    "used": ("used", "used by"),
    "ran": ("ran", "ran in"),
    "launched": ("launched by", "launched"),
}
"""Kind of an edge → what its target says of its source, and the reverse."""
_MOST_LINES = 60
_HASHES = 32
"""From this length on a hexadecimal value is set as code."""


def anchors(graph: Graph) -> dict[str, str]:
    """Key of a node → id of its card."""
    return {node.key: f"n{number}" for number, node in enumerate(graph.nodes)}


def against(picture: Picture) -> dict[str, list[Finding]]:
    """Key of a checkpoint, export or corpus → what was found against its folder.

    Folders of two runs may have the same name: then a finding is at neither, but above the graph.
    """
    named: dict[str, list[str]] = {}
    for node in picture.graph.nodes:
        if isinstance(node.facts.get("name"), str) and node.state != "absent" and node.kind != "run":
            named.setdefault(node.facts["name"], []).append(node.key)
    found: dict[str, list[Finding]] = {}
    for each in picture.findings:
        for part in PurePath(each.where or "").parts:
            if len(named.get(part, ())) == 1:
                found.setdefault(named[part][0], []).append(each)
    return found


def bad(picture: Picture) -> set[str]:
    """Keys of the nodes that are drawn red."""
    return {node.key for node in picture.graph.nodes if node.state in _BAD} | set(against(picture))


def cards(picture: Picture, ids: Mapping[str, str]) -> Iterator[str]:
    """A card for every node."""
    nodes, found = picture.graph.by_key(), against(picture)
    into: dict[str, list[Edge]] = {}
    out: dict[str, list[Edge]] = {}
    for edge in picture.graph.edges:
        into.setdefault(edge.target, []).append(edge)
        out.setdefault(edge.source, []).append(edge)
    for node in picture.graph.nodes:
        look, words = _trust(node, picture, found.get(node.key, []))
        links = [_link(edge, nodes[edge.source], ids, 0) for edge in into.get(node.key, [])]
        links += [_link(edge, nodes[edge.target], ids, 1) for edge in out.get(node.key, [])]
        facts = "".join(f"<dt>{_text(name)}</dt><dd>{value}</dd>" for name, value in _facts(node.facts))
        yield (
            f'<section class="card" id="{ids[node.key]}" aria-label="{_text(node.title)}">'
            f'<a class="close" href="#graph" aria-label="close">×</a><h2>{_text(node.title)}</h2>'
            f'<p class="kind">{_text(node.kind)}{" · " + node.state if node.state else ""}</p>'
            f'<p class="status {look}">{_text(words)}</p><ul>{"".join(links)}</ul><dl>{facts}</dl></section>'
        )


def _trust(node: Node, picture: Picture, found: list[Finding]) -> tuple[str, str]:
    """How far the node can be believed: a class, and the words."""
    if found:
        return "bad", "; ".join(each.what for each in found)
    if node.state in _BAD:
        reason = node.facts.get("reason")
        return "bad", f"{_WORDS[node.state]}: {reason}" if reason else _WORDS[node.state]
    if node.state == "absent":
        return "open", _WORDS["absent"]
    if not picture.checked:
        return "open", "not verified: this is what the folder says"
    if node.kind == "checkpoint":
        more = f"; {_WORDS[node.state]}" if node.state in _WORDS else ""
        return "good", f"signatures, statements and file set verified; payload: harness verify{more}"
    return "good", "told by verified statements"


def _link(edge: Edge, other: Node, ids: Mapping[str, str], side: int) -> str:
    note = f" ({_text(edge.note)})" if edge.note else ""
    return f'<li>{_EDGES[edge.kind][side]} <a href="#{ids[other.key]}">{_text(other.title)}</a>{note}</li>'


def _facts(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Every fact as a line, nested ones with dotted names; values as HTML."""
    lines = list(_flat(facts, ""))
    for name, value in lines[:_MOST_LINES]:
        is_code = len(value) >= _HASHES and all(each in "0123456789abcdef" for each in value)
        yield name, f"<code>{value}</code>" if is_code else _text(value)
    if len(lines) > _MOST_LINES:
        yield "…", f"{len(lines) - _MOST_LINES} more: harness lineage --format json"


def _flat(value: Any, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _flat(inner, f"{name} {number + 1}" if isinstance(inner, Mapping) else name)
    elif value is not None and value != "":
        yield name, {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _text(value: str) -> str:
    return escape(visible(value))
