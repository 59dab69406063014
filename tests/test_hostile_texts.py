"""Whoever signs may be hostile: their words are text to browser, terminal and Markdown, and no verdict.

The run holds `hostile_texts.POISON` in every string and every name of its statements that has no form of its
own, signed by a trusted key, and in its events.
"""

from __future__ import annotations

import copy
import json
import re
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import browser
import mistreated
import pytest
import run_folder
from attack import trusted
from hostile_texts import FORGED, POISON, poisoned
from run_folder import SampleRun

from harness.audit import attest
from harness.audit.folders import opening
from harness.commands import evaluation
from harness.format import strict_json
from harness.provenance import later, statements
from harness.provenance.policy import policy_schema
from harness.terminal import json_text, shown

_TAGS = {
    *("html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "h3", "h4", "p", "div", "a", "b"),
    *(
        "section",
        "dl",
        "dt",
        "dd",
        "ul",
        "li",
        "details",
        "summary",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
    ),
    *(
        "code",
        "pre",
        "figure",
        "figcaption",
        "svg",
        "path",
        "rect",
        "text",
        "circle",
        "line",
        "g",
        "polyline",
    ),
    *("strong", "em", "tspan", "polygon"),
}
"""Elements of our pages: none that runs, loads or sends anything."""


@dataclass
class Scene:
    """A hostile run and what every verb made of it."""

    folder: Path
    said: dict[tuple[str, ...], tuple[int, str, str]]
    """Command → exit code, stdout, stderr."""

    def page(self, name: str) -> str:
        """The output of `lineage` in that format, or a file of the report."""
        if name.startswith("report."):
            return (self.folder / "out" / "report" / name).read_text()
        return next(
            out for words, (_, out, _) in self.said.items() if words[0] == "lineage" and name in words
        )


def _hostile(step: int, facts: dict[str, Any]) -> None:
    """What has to agree with files stays: the config, the ledger."""
    kept = {name: facts[name] for name in ("config", "outcome", "determinism")}
    reason = facts["segment"]["reason"]
    made = poisoned(copy.deepcopy(facts), statements.SCHEMA)
    facts |= {**made, **kept, "segment": {**made["segment"], "reason": reason}}


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """Every verb, about the run, about a checkpoint of it and about its export."""
    folder = tmp_path_factory.mktemp("hostile")
    signer = run_folder.identity(folder / "me")
    run = SampleRun(folder / "run", signer, tweak=_hostile, policy=b"x")
    run.advance(10)
    changed = {
        "differences": [{"what": "a", "before": "1", "after": "2"}],
        "skipped": [{"name": "n", "reason": "r", "checkpoint": None}],
    }
    run.resume("same-data", accepted=["data"], **changed)  # type: ignore[arg-type]
    run.advance(20, 30)
    opened = opening.open_checkpoint(run.saved[30].folder, trusted(signer))
    for kind, facts in mistreated.FACTS.items():
        attest.add(opened, kind, poisoned(facts(), later.SCHEMAS[kind]), signer)
    (run.root / "events").mkdir()
    events = [
        {"time": 1.0, "level": "error", "event": POISON, "error": POISON},
        {"time": 2.0, POISON: POISON},
    ]
    (run.root / "events" / "rank-00000.jsonl").write_bytes(b"".join(map(strict_json.dumps, events)))
    _poison_metrics(run)
    root, earlier, newest = str(run.root), str(run.saved[20].folder), str(run.saved[30].folder)
    exported, key = (
        str(folder / "exported"),
        ("--key", str(folder / "me.ed25519.pub"), str(folder / "me.p256.pub")),
    )
    policy = ("--policy", str(folder / "hostile.yaml"))
    named = {"name": POISON, "keys": ["me.ed25519.pub", "me.p256.pub"], "runs": [POISON, "*"]}
    Path(policy[1]).write_text(json.dumps({"format": policy_schema.FORMAT, "identities": [named]}))
    commands = [
        ("policy", "check", policy[1]), ("policy", "check", policy[1], "--json"),
        *((verb, root, *policy) for verb in ("verify", "show", "lineage", "gate", "kernels")),
        ("verify", root, *key), ("verify", root, *key, "--json"), ("show", newest), ("show", newest, *key),
        ("show", newest, "--json"), ("show", newest, "--rerun", str(folder / "rerun"), *key),
        *(("lineage", root, "--format", name, *key) for name in ("text", "html", "mermaid", "json")),
        ("lineage", root), ("diff", earlier, newest, *key), ("diff", earlier, newest, "--json"),
        ("kernels", newest, *key), ("report", root, "--out", str(folder / "out" / "report"), *key),
        ("watch", root, "--once"), ("head", root, *key), ("head", root), ("gate", root, *key),
        ("export", newest, exported, "--signing-key", str(folder / "me.key"), *key),
        ("verify", exported, *key),
        ("lineage", root, "--with", exported, *key),
        ("attest", newest, "--kind", "svr", "--signing-key", str(folder / "me.key"), *key),
    ]  # fmt: skip
    return Scene(folder, {words: mistreated.call(words) for words in commands})


def _poison_metrics(run: SampleRun) -> None:
    """Evaluations in metrics.jsonl have the names that are signed."""
    lines = [json.loads(line) for line in run.folder.metrics.read_bytes().splitlines()]
    for line in lines:
        if "evaluation" in line:
            line["evaluation"] = {"accuracy": 0.5, POISON: 0.5}
    run.folder.metrics.write_bytes(b"".join(map(strict_json.dumps, lines)))


def test_no_verb_lets_a_terminal_obey_or_a_line_be_forged(scene: Scene) -> None:
    """Oracle: every character that arrives is one that a terminal shows, no line begins as one of ours does
    and goes on with the words of the signer, and the words do arrive."""
    for words, (code, out, err) in scene.said.items():
        assert code in mistreated.CODES, (words, err)
        for line in (out + err).split("\n"):
            assert line.isprintable(), (words, line)
            assert not any(line.startswith(f"{each}forged") for each in FORGED), (words, line)
    told = [words for words, (_, out, err) in scene.said.items() if "forged" in out + err]
    assert {words[0] for words in told} >= {"verify", "show", "lineage", "report", "export", "policy"}


class _Elements(HTMLParser):
    """Names of elements, and attributes, of a page as a browser's tokenizer takes it."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs


@pytest.mark.parametrize("name", ["html", "report.html"])
def test_a_page_has_our_elements_only_and_nothing_hides_in_it(name: str, scene: Scene) -> None:
    """Oracle: Python's own HTML parser; no handler, no address but within the page, no invisible sign."""
    page = scene.page(name)
    found = _Elements(page)
    assert found.tags <= _TAGS
    assert not [
        key for key, _ in found.attributes if key.startswith("on") or key in ("src", "action", "srcdoc")
    ]
    assert all(str(value).startswith("#") for key, value in found.attributes if key == "href")
    assert all(line.isprintable() for line in page.split("\n"))
    assert "&lt;script&gt;" in page


@pytest.mark.skipif(browser.PROGRAM is None, reason="no Chromium is installed")
def test_nothing_runs_in_a_real_browser(scene: Scene, tmp_path: Path) -> None:
    """Oracle: the page's global, its title, what it asks for, with the page's own policy taken out, which
    would stop a script that got in; a page with the words as markup is caught by the same looks."""
    window = browser.Browser()
    try:
        for name in ("html", "report.html", "caught"):
            page = POISON if name == "caught" else scene.page(name)
            page, cut = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
            assert cut == (name != "caught")
            (tmp_path / f"{name}.html").write_text(page)
            window.open(tmp_path / f"{name}.html")
            window.evaluate("new Promise(done=>setTimeout(done,50))")
            looked = [
                window.evaluate("typeof owned=='undefined'"),
                window.evaluate("document.title.trim()!='owned'"),
                window.evaluate("document.querySelectorAll('script,img,iframe,object,embed,form').length==0"),
                window.requests == [(tmp_path / f"{name}.html").as_uri()],
            ]
            assert looked == [name != "caught"] * 4, (name, looked)
    finally:
        window.close()


def test_markdown_has_no_markup_of_the_signers(scene: Scene) -> None:
    """Oracle: markdown-it, a CommonMark parser, with raw HTML allowed: what it takes for HTML is ours."""
    markdown_it = pytest.importorskip("markdown_it")
    report = scene.page("report.md")
    assert all(line.isprintable() for line in report.split("\n"))
    parsed = markdown_it.MarkdownIt("commonmark", {"html": True}).enable("table").parse(report)
    inline = [child for token in parsed for child in token.children or ()]
    raw = [token.content for token in (*parsed, *inline) if token.type in ("html_inline", "html_block")]
    assert not [each for each in raw if not re.fullmatch(r"</?(details|summary|b|br)>.*\n?", each)], raw
    assert not [
        each for each in inline if each.type in ("image", "link_open") and "javascript" in str(each.attrs)
    ]


def test_the_pictures_are_xml(scene: Scene) -> None:
    """Oracle: Python's XML parser, which refuses the control characters that XML forbids."""
    pictures = sorted((scene.folder / "out" / "report").glob("*.svg"))
    assert pictures
    for path in pictures:
        tags = {each.tag.rpartition("}")[2] for each in ElementTree.parse(path).iter()}
        assert tags <= _TAGS


def test_what_is_told_of_an_evaluation_is_one_line() -> None:
    """Oracle: the names of the measures are the signer's, and `harness evaluate --once` tells them."""
    told = evaluation.told({"result": "PASSED", "metrics": {POISON: 1.0}, "examples": 3})
    assert told.isprintable()


@pytest.mark.parametrize("text", [POISON, "a\x9b31m", "\u202e", "\ud800", "é ✔ plain"])
def test_json_shows_and_still_says_the_same(text: str) -> None:
    """Oracle: json, which reads the same value back."""
    made = json_text({text: [text]}, indent=2)
    assert json.loads(made) == {text: [text]}
    assert all(line.isprintable() for line in made.split("\n"))
    assert ("é" in made) == ("é" in text)
    assert all(line.isprintable() for line in shown(text).split("\n"))
