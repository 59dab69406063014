"""A report as one HTML page that holds everything it shows: no script, nothing loaded from outside."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from harness.errors import visible
from harness.report.document import (
    Block,
    Bullets,
    Heading,
    Link,
    Paragraph,
    Picture,
    Source,
    Status,
    Table,
    anchor,
    readable,
    right_aligned,
)

_STYLE = """
:root{color-scheme:light dark;--text:#1f2328;--soft:#57606a;--line:#d0d7de;--back:#fff;--panel:#f6f8fa;
--good:#1a7f37;--bad:#cf222e;--open:#9a6700}
@media(prefers-color-scheme:dark){:root{--text:#e6edf3;--soft:#9da7b1;--line:#30363d;--back:#0d1117;
--panel:#161b22;--good:#3fb950;--bad:#f85149;--open:#d29922}}
body{margin:0;background:var(--back);color:var(--text);
font:15px/1.55 system-ui,-apple-system,"Segoe UI",Helvetica,Arial,sans-serif}
main{max-width:900px;margin:0 auto;padding:32px 24px 64px}
h1,p,li{overflow-wrap:anywhere}
h1{font-size:26px;margin:0 0 12px}
h2{font-size:19px;margin:36px 0 12px;padding-bottom:6px;border-bottom:1px solid var(--line)}
h3{font-size:16px;margin:24px 0 8px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:13.5px;min-width:50%}
th,td{padding:5px 14px 5px 0;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
th{color:var(--soft);font-weight:600;vertical-align:bottom}
.short{white-space:nowrap}
.number{text-align:right;font-variant-numeric:tabular-nums}
code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;font-size:.9em}
code{background:var(--panel);padding:1px 4px;border-radius:4px;overflow-wrap:anywhere}
pre{background:var(--panel);padding:12px 16px;border-radius:6px;overflow-x:auto}
.status{border-left:4px solid;background:var(--panel);padding:8px 14px;margin:8px 0;border-radius:0 6px 6px 0}
.good{border-color:var(--good)}.bad{border-color:var(--bad)}.open{border-color:var(--open)}
td code{overflow-wrap:normal;white-space:nowrap}
figure{margin:16px 0}svg{display:block;max-width:100%;height:auto}.narrow{display:none}
@media screen and (max-width:600px){main{padding:20px 14px 48px}.wide{display:none}.narrow{display:block}
.narrow svg{width:100%;max-width:440px}.sheet{margin-right:-14px}
.sheet td:first-child,.sheet th:first-child{position:sticky;left:0;max-width:40vw;background:var(--back)}
.stack table,.stack tbody,.stack tr,.stack td{display:block}.stack thead{display:none}
.stack tr{padding:8px 0;border-bottom:1px solid var(--line)}
.stack td{padding:1px 0;border:0}
.stack td:first-child{font-weight:600}.stack td+td::before{content:attr(data-label) ": ";color:var(--soft)}}
a{color:inherit}
summary{cursor:pointer;color:var(--soft)}
@media print{:root{color-scheme:light;--text:#1f2328;--soft:#57606a;--line:#d0d7de;--back:#fff}
:root{--panel:#f6f8fa}body{font-size:12px}main{max-width:none;padding:0}table{font-size:10.5px;min-width:0;width:100%}
.scroll,pre{overflow:visible}td code{white-space:normal;overflow-wrap:anywhere}
pre{white-space:pre-wrap;font-size:9px;columns:2}svg{width:auto;max-width:100%}h2,h3,h4,thead{break-after:avoid}
tr,figure,.status,li{break-inside:avoid}details::details-content{content-visibility:visible;display:block}}
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def text(value: str) -> str:
    """``value`` as HTML, with code spans; what would turn the reading around or does not show, as escapes."""
    shown = escape(visible(" ".join(value.split())))
    if isinstance(value, Link):
        return f'<a href="#{escape(value.target)}">{shown}</a>'
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", shown)


def render(blocks: Sequence[Block], title: str) -> str:
    """The whole page."""
    body = "\n".join(_block(block) for block in blocks)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{escape(visible(title))}</title><style>{_STYLE}</style></head>\n"
        f"<body><main>\n{body}\n</main></body></html>\n"
    )


def _block(block: Block) -> str:
    match block:
        case Heading(2, words):
            return f'<h2 id="{escape(anchor(words))}">{text(words)}</h2>'
        case Heading(level, words):
            return f"<h{level}>{text(words)}</h{level}>"
        case Paragraph(words):
            return f"<p>{text(words)}</p>"
        case Bullets(items):
            return "<ul>" + "".join(f"<li>{text(item)}</li>" for item in items) + "</ul>"
        case Status(kind, words):
            return f'<p class="status {kind}">{text(words)}</p>'
        case Picture(svg, narrow, _, _):
            return f'<figure><div class="wide">{svg}</div><div class="narrow">{narrow}</div></figure>'
        case Source(title, body):
            return f"<details><summary>{text(title)}</summary><pre>{escape(readable(body))}</pre></details>"
        case Table():
            return _table(block)


_SHORT = 20
"""Letters of a cell that stays in one line: the name of a run, an interval."""
_PROSE = 36
"""Letters of a cell from which a phone shows a row of more than two cells as lines below each other."""


def _cell(cell: str, right: bool, head: str) -> str:
    """``head``: what a phone shows before it; empty for nothing."""
    kind = "number" if right else "short" if len(cell) <= _SHORT and not isinstance(cell, Link) else ""
    classes = f' class="{kind}"' if kind else ""
    named = f' data-label="{escape(visible(head))}"' if head else ""
    return f"<td{classes}{named}>{text(cell)}</td>"


def _table(table: Table) -> str:
    aligned = right_aligned(table)
    stacked = len(table.head) > 2 and any(len(cell) >= _PROSE for row in table.rows for cell in row)
    classes = [' class="number"' if right else "" for right in aligned]
    head = "".join(f"<th{kind}>{text(cell)}</th>" for kind, cell in zip(classes, table.head, strict=True))
    named = table.head if stacked else [""] * len(table.head)
    rows = "".join(
        f"<tr>{''.join(_cell(*each) for each in zip(row, aligned, named, strict=True))}</tr>"
        for row in table.rows
    )
    kind = " stack" if stacked else " sheet" if len(table.head) > 2 else ""
    inner = f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody>"
    return f'<div class="scroll{kind}"><table>{inner}</table></div>'
