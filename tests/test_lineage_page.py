"""The lineage page in a real browser: cards by mouse and keyboard, bad parts red, no request to anywhere."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import browser
import pytest
import run_folder
from browser import Browser
from test_lineage import drawn, edges, key_words, statement

from harness.audit.lineage import html
from harness.audit.lineage.picture import Picture
from harness.provenance.corpora import CorpusStatement
from harness.provenance.lineage import Corpus, Member, graph

pytestmark = pytest.mark.skipif(browser.PROGRAM is None, reason="no Chromium is installed")

RED = "getComputedStyle(document.documentElement).getPropertyValue('--bad').trim()"
OPEN = (
    "[...document.querySelectorAll('.card')].filter(e=>getComputedStyle(e).display!='none')"
    ".map(e=>e.innerText)"
)


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    """One browser for the module."""
    shown = Browser()
    yield shown
    shown.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A child run that began with another run's checkpoint, resumed once, one checkpoint spoilt; verified."""
    place = tmp_path_factory.mktemp("page") / ("alongname" * 8)  # wider than a phone
    place.mkdir()
    signer = run_folder.identity(place / "me")
    base = run_folder.SampleRun(place / "base", signer, name="base", values="a")
    base.advance(10, 20)
    child = run_folder.SampleRun(
        place / "run", signer, name="child", values="b", start=base.saved[20].as_start(base)
    )
    child.advance(10)
    child.resume("same-data", differences=[{"what": "world size", "before": "1", "after": "2"}])
    child.advance(20, 30)
    bundle = child.saved[20].folder / "provenance" / "checkpoint.sigstore.json"
    bundle.write_bytes(bundle.read_bytes().replace(b'"sig":"', b'"sig":"AAAA'))
    outcome = drawn(
        place / "run", "--format", "html", "--with", str(place / "base"), *key_words(place / "run")
    )
    assert outcome.exit_code == 1
    (place / "page.html").write_text(outcome.text)
    return place / "page.html"


def keep(window: Browser, name: str) -> None:
    """Write a picture for a person where ``$SCREENSHOTS`` says."""
    folder = os.environ.get("SCREENSHOTS")
    if folder:
        window.screenshot(Path(folder) / f"{name}.png")


@pytest.mark.parametrize("width", [1280, 390])
def test_a_click_opens_a_card_and_close_closes_it(window: Browser, page: Path, width: int) -> None:
    """Oracle: what the browser displays; a phone's first window shows checkpoints, and nothing overflows, nor
    does the drawing scroll sideways."""
    window.open(page, width, 844)
    assert window.requests == [page.as_uri()]
    assert window.evaluate("document.documentElement.scrollWidth") <= width
    assert window.evaluate(OPEN) == []
    drawing = ".narrow" if width == 390 else ".wide"
    left, right = window.evaluate(
        f"(r=>[r.left,r.right])(document.querySelector('{drawing} circle').getBoundingClientRect())"
    )
    assert 0 < left < right < width
    sizes = window.evaluate("(e=>[e.scrollWidth,e.clientWidth])(document.querySelector('#graph'))")
    assert sizes[0] <= sizes[1]
    displayed = "[...document.querySelectorAll('svg')].filter(e=>e.getClientRects().length).length"
    assert window.evaluate(displayed) == 1
    keep(window, f"page-{width}")
    window.click(f"{drawing} a:not(.bad) circle.complete")
    (card,) = window.evaluate(OPEN)
    assert "child step 10" in card
    assert "signatures, statements and file set verified" in card
    keep(window, f"card-{width}")
    box = window.evaluate(
        "(r=>[r.left,r.top,r.right,r.bottom])(document.querySelector('.card:target').getBoundingClientRect())"
    )
    assert min(box) >= 0
    assert box[2] <= width
    assert box[3] <= 844
    window.click(".card:target .close")
    assert window.evaluate(OPEN) == []


OUTSIDE = """
[...document.querySelectorAll(DRAWING + ' path')].filter(e => {
    const box = e.getBBox(), sheet = e.ownerSVGElement.viewBox.baseVal
    return box.x < 0 || box.x + box.width > sheet.width
}).length + [...document.querySelectorAll(DRAWING + ' a')].filter(a => {
    const box = a.querySelector('rect')
    return box && [...a.querySelectorAll('text')].some(e => e.getBBox().width + 10 > box.getBBox().width)
}).length
"""


@pytest.mark.parametrize("width", [1280, 390])
def test_every_line_of_the_drawing_lies_in_it_and_every_text_in_its_box(
    window: Browser, tmp_path: Path, width: int
) -> None:
    """Oracle: the boxes that the browser computes, of a run whose corpus, a box below its data set, and whose
    facts are longer than a line."""
    made = statement(
        10,
        "1" * 64,
        None,
        data={
            "kind": "prepared",
            "corpus_sha256": "c" * 64,
            "tokenizer_sha256": "b" * 64,
            "counts": {f"held_out_documents_{number}": 10**9 for number in range(9)},
        },
        code={
            "harness": "0.1.0+0123456789abcdef",
            "git_commit": "4" * 40,
            "dirty": True,
            "diff_sha256": "5" * 64,
            "task": {"import_path": "my_project.models.transformer:LanguageModelling", "sha256": "6" * 64},
        },
    )
    told = {
        "name": "common-crawl-2026-11-filtered-english-and-german",
        "source": {"files": 1, "kind": "wheel", "sha256": "7" * 64},
        "documents": {"kept": {"documents": 1}, "read": {"documents": 2}},
        "tokenizer": {"sha256": "b" * 64},
    }
    corpus = Corpus("corpus", CorpusStatement("c" * 64, "h1:", told))
    whole = graph([Member("step-00000010", "complete", made)], corpora=[corpus])
    assert len(edges(whole, "prepared")) == 2
    shown = tmp_path / "page.html"
    shown.write_text(html.render(Picture(tmp_path, whole, False, (), (), 0), whole))
    window.open(shown, width, 844)
    keep(window, f"corpus-{width}")
    assert window.evaluate(OUTSIDE.replace("DRAWING", "'.narrow'" if width == 390 else "'.wide'")) == 0


def test_a_sheet_of_paper_holds_the_whole_drawing_and_every_id(window: Browser, page: Path) -> None:
    """Oracle: the page as it is printed 720 pixels wide: nothing is wider, and the folded table is shown."""
    window.open(page, 720)
    window.call("Emulation.setEmulatedMedia", media="print")
    try:
        assert window.evaluate("document.documentElement.scrollWidth") <= 720
        assert window.evaluate("document.querySelector('.wide svg').getBoundingClientRect().right") <= 720
        assert window.evaluate("document.querySelector('details table').getBoundingClientRect().right") <= 720
        assert window.evaluate("document.querySelector('details code').offsetHeight") > 0
    finally:
        window.call("Emulation.setEmulatedMedia", media="")


def test_the_keyboard_alone_walks_from_node_to_node(window: Browser, page: Path) -> None:
    """Oracle: Tab reaches the first node, Enter opens its card, Tab and Enter there follow a link in it."""
    window.open(page)
    window.press("Tab")
    while window.evaluate("!document.activeElement.matches('svg a')"):
        window.press("Tab")
    window.press("Enter")
    (first,) = window.evaluate(OPEN)
    while window.evaluate("!document.activeElement.matches('.card:target li a')"):
        window.press("Tab")
    window.press("Enter")
    (second,) = window.evaluate(OPEN)
    assert first != second


def test_what_is_wrong_is_red_and_says_why_and_nothing_else_is(window: Browser, page: Path) -> None:
    """Oracle: colours as the browser computes them; step 20 was spoilt, so step 30 has no parent."""
    window.open(page)
    red = window.evaluate(
        f"(e=>(e.style.color={RED},document.body.append(e),getComputedStyle(e).color))"
        "(document.createElement('i'))"
    )
    stroke = "[...document.querySelectorAll('.wide a')].map(a=>[a.querySelector('.name').textContent,"
    stroke += "getComputedStyle(a.querySelector('circle,rect')).stroke])"
    reds = [name for name, colour in window.evaluate(stroke) if colour == red]
    assert sorted(reds) == ["child step 30", "step-00000020"]
    window.click("svg a.bad circle.unreadable")
    (card,) = window.evaluate(OPEN)
    assert "signed by none of the" in card
    keep(window, "bad")


def test_what_nobody_verified_is_not_green(window: Browser, page: Path) -> None:
    """Oracle: the page without keys; the card of a checkpoint says that it was not verified."""
    unchecked = page.with_name("unchecked.html")
    unchecked.write_text(drawn(page.parent / "base", "--format", "html").text)
    window.open(unchecked)
    green = window.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--good')")
    colours = "[...document.querySelectorAll('svg circle')].map(e=>getComputedStyle(e).fill)"
    assert green not in window.evaluate(colours)
    window.click("svg a circle.complete")
    assert "not verified" in window.evaluate(OPEN)[0]
