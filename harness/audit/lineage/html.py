"""A lineage as one HTML page: a drawing whose nodes open cards, and a table. No script, nothing loaded, every
string escaped.
"""

from __future__ import annotations

from html import escape

from harness.audit.lineage import cards, svg
from harness.audit.lineage.picture import Picture
from harness.errors import visible
from harness.provenance.lineage import Graph

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_STYLE = """
:root{color-scheme:light dark;--text:#1f2328;--soft:#57606a;--line:#8c959f;--back:#fff;--panel:#f6f8fa;
--edge:#d0d7de;--good:#1a7f37;--bad:#cf222e;--open:#9a6700;--launch:#0969da}
@media(prefers-color-scheme:dark){:root{--text:#e6edf3;--soft:#9da7b1;--line:#6e7681;--back:#0d1117;
--panel:#161b22;--edge:#30363d;--good:#3fb950;--bad:#f85149;--open:#d29922;--launch:#58a6ff}}
body{margin:0;background:var(--back);color:var(--text);
font:15px/1.5 system-ui,"Segoe UI",Helvetica,Arial,sans-serif}
main{max-width:1240px;margin:0 auto;padding:28px 24px 56px}
h1{font-size:24px;margin:0 0 10px;overflow-wrap:anywhere}
.status{border-left:4px solid;background:var(--panel);padding:8px 14px;margin:8px 0;border-radius:0 6px 6px 0;
overflow-wrap:anywhere}
.good{border-color:var(--good)}.bad{border-color:var(--bad)}.open{border-color:var(--open)}
.scroll{overflow-x:auto}
svg{display:block;margin:16px 0}
#graph{outline:none}
svg text{fill:var(--text);font-size:13px}
svg .soft{fill:var(--soft);font-size:12px}
svg .name{font-weight:600}
svg .path{fill:none;stroke:var(--line);stroke-width:2}
svg .resumed,svg .began{stroke:var(--launch);stroke-dasharray:5 4}
svg .skipped{stroke:var(--bad);stroke-dasharray:2 4}
svg .exported{stroke:var(--good);stroke-dasharray:1 4}
svg .used{stroke:var(--edge);stroke-width:1.5}
svg .node{cursor:pointer;outline:none}
svg .node:hover .box,svg .node:focus-visible .box{stroke:var(--launch);stroke-width:2}
svg .node:hover circle,svg .node:focus-visible circle{stroke:var(--launch)}
svg .node:focus-visible .name{text-decoration:underline}
svg .box{fill:var(--panel);stroke:var(--edge)}
svg .launch{stroke:var(--launch)}
svg .complete,svg .elsewhere{fill:var(--good);stroke:var(--good)}
svg .pruned{fill:var(--back);stroke:var(--good);stroke-dasharray:3 2}
svg .nonfinite,svg .damaged,svg .unreadable{fill:var(--back);stroke:var(--bad)}
svg .bad .box{stroke:var(--bad);stroke-width:2}
svg .bad circle{fill:var(--back);stroke:var(--bad)}
svg .bad .name{fill:var(--bad)}
.unchecked svg .complete,.unchecked svg .elsewhere{fill:var(--line);stroke:var(--line)}
.unchecked svg .pruned{stroke:var(--line)}
svg .absent{fill:var(--back);stroke:var(--open);stroke-dasharray:2 2}
table{border-collapse:collapse;font-size:13px}
th,td{padding:5px 14px 5px 0;border-bottom:1px solid var(--edge);text-align:left;vertical-align:top}
th{color:var(--soft);font-weight:600}
td{white-space:nowrap}
code{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:12px;overflow-wrap:anywhere}
summary{cursor:pointer;margin:12px 0}
.narrow{display:none}
@media(max-width:640px){main{padding:18px 14px 40px}h1{font-size:20px}
.wide:has(+.narrow){display:none}.narrow{display:block}}
@media print{:root{color-scheme:light;--text:#1f2328;--soft:#57606a;--line:#8c959f;--back:#fff;
--panel:#f6f8fa;--edge:#d0d7de}.scroll{overflow:visible}svg{max-width:100%;height:auto}
td{white-space:normal}details::details-content{content-visibility:visible;display:block}}
"""

_LEGEND = (
    "Newest on top. Filled: complete, green when it was verified and grey when not; dashed: pruned, only its "
    "signatures are left; a pile: many between which nothing else happened; red: something is wrong, or set "
    "aside; yellow: not here. Blue dashes: resumed from, or began with another run's weights; green dots: "
    "exported; red dots: skipped by a resume. Click, or Tab and Enter, for everything that is known of a "
    "node."
)

_MOST_MARKED = 1000
"""Nodes of a page on which the one whose card is open is marked, and that has a drawing for phones: each
takes a rule of its own and more shapes."""


def render(picture: Picture, whole: Graph) -> str:
    """The whole page; where a node stands for many checkpoints, the table still names each of ``whole``."""
    title = visible(f"Lineage of {picture.path}")
    state = "good" if picture.verified else "bad" if picture.exit_code == 1 else "open"
    ids = cards.anchors(picture.graph)
    bad = cards.bad(picture)
    drawing = f'<div class="wide">{svg.svg(picture.graph, ids, bad)}</div>'
    if len(ids) <= _MOST_MARKED:
        drawing += f'<div class="narrow">{svg.svg(picture.graph, ids, bad, narrow=True)}</div>'
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="status {state}">{escape(visible(picture.trust))}</p>',
        *(f'<p class="status bad">{escape(str(each))}</p>' for each in picture.findings),
        *(f'<p class="status open">{escape(visible(note))}</p>' for note in picture.notes),
        f'<div class="scroll" id="graph" tabindex="-1">{drawing}</div>',
        f"<p>{_LEGEND}</p>",
        f'<details><summary>Every checkpoint with its id</summary><div class="scroll">{_table(whole)}'
        "</div></details>",
        *cards.cards(picture, ids),
    ]
    style = _STYLE + cards.STYLE + _marks(list(ids.values()))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{escape(title)}</title><style>{style}</style></head>\n"
        f'<body class="{"checked" if picture.checked else "unchecked"}"><main>\n'
        + "\n".join(body)
        + "\n</main></body></html>\n"
    )


def _marks(ids: list[str]) -> str:
    if len(ids) > _MOST_MARKED:
        return ""
    chosen = ",".join(f'main:has(#{each}:target) svg [href="#{each}"] .name' for each in ids)
    return f"{chosen}{{text-decoration:underline;fill:var(--launch)}}\n" if ids else ""


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
