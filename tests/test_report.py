"""Reports: curves as SVG, endings of runs, what could still vary, pages that show hostile text as text."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import statistics
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import browser
import fake_runs
import orjson
import pytest
import run_folder
from browser import Browser
from hypothesis import given, settings
from hypothesis import strategies as st
from run_folder import Predicate

import harness
from harness import cli
from harness.audit.tiers import rules
from harness.commands.watch import Follower
from harness.errors import UsageError
from harness.format.ledger import Coverage, Ledger, Row
from harness.report import checklist, curves, facts, figure, frame, html, markdown, pictures, report, runs
from harness.report.document import Bullets, Heading, Link, Paragraph, Picture, Source, Status, Table, anchor
from harness.report.figure import Figure, Mark, Series
from harness.report.study import study

SVG = "{http://www.w3.org/2000/svg}"
UNKNOWN = rules.compute(rules.Evidence(nothing=rules.NOT_SIGNED))


def scored(root: Path, score: float | None, *, seed: int = 0, settings: str = "") -> runs.Run:
    """A finished run whose last evaluation has the figure ``score``; None stands for a NaN, as in JSON."""
    fake_runs.finished(root, seed=seed, settings=settings, figures={"score": score})
    return runs.read(root)


def drawn(*series: Series, marks: tuple[Mark, ...] = (), from_zero: bool = False) -> ElementTree.Element:
    """A figure of ``series`` as parsed XML."""
    made = figure.draw(Figure("loss", "step", "nats", series, marks, from_zero))
    return ElementTree.fromstring(made)


def corners(svg: ElementTree.Element) -> list[tuple[float, float]]:
    """Every corner of every curve, in pixels."""
    lines = [line.get("points", "") for line in svg.iter(f"{SVG}polyline")]
    return [(float(x), float(y)) for line in lines for x, y in (pair.split(",") for pair in line.split())]


# figure


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9), st.integers(2, 12))
def test_ticks_are_round_and_inside_and_evenly_spaced(low: float, share: float, wanted: int) -> None:
    """Oracle: 1, 2 or 5 times a power of ten, checked on the difference of neighbours."""
    span = share * max(abs(low), 1e-3)
    high = low + span
    made = figure.ticks(low, high, wanted)
    slack = (high - low) * 1e-6 + abs(low) * 1e-9
    assert all(low - slack <= value <= high + slack for value in made)
    assert len(made) <= 2.6 * wanted
    for before, after in pairwise(made):
        leading = (after - before) / 10 ** math.floor(math.log10((after - before) * 1.0000001))
        assert min(abs(leading - round_one) for round_one in (1, 2, 5, 10)) < 0.01 + abs(low) / span * 1e-6


@pytest.mark.parametrize(
    ("value", "largest", "shown"),
    [(0.0, 1.0, "0"), (5000, 10000, "5k"), (5000, 8000, "5000"), (1.5e6, 2e7, "1.5M"), (0.25, 1, "0.25")],
)
def test_tick_labels_are_short_and_alike_on_one_axis(value: float, largest: float, shown: str) -> None:
    """Oracle: examples."""
    assert figure.number(value, largest) == shown


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=300))
def test_any_values_give_a_picture_with_every_corner_inside_the_frame(values: list[float]) -> None:
    """Oracle: an XML parser, and the size of the picture."""
    svg = drawn(Series("a", tuple((float(step), value) for step, value in enumerate(values))))
    for x, y in corners(svg):
        assert figure.LEFT - 1 <= x <= figure.WIDTH - figure.RIGHT + 1
        assert figure.TOP - 1 <= y <= figure.HEIGHT - figure.BOTTOM + 1


def test_a_value_that_is_not_finite_breaks_the_curve_and_is_named() -> None:
    """Oracle: two stretches, and the words in the picture."""
    svg = drawn(Series("a", ((1, 3.0), (2, 2.0), (3, math.nan), (4, 2.0), (5, 1.0))))
    assert len(list(svg.iter(f"{SVG}polyline"))) == 2
    assert any("not finite" in (text.text or "") for text in svg.iter(f"{SVG}text"))


def test_a_long_curve_keeps_its_extremes_and_grows_no_further() -> None:
    """Oracle: the spike that was put in; the number of corners."""
    points = [(float(step), 1.0) for step in range(100_000)]
    points[54_321] = (54_321.0, 9.0)
    thinned = curves.thin(points)
    assert (54_321.0, 9.0) in thinned
    assert len(thinned) <= 3 * curves.BINS


def test_a_short_curve_is_drawn_as_it_is() -> None:
    """Oracle: the points themselves."""
    points = [(float(step), step**0.5) for step in range(50)]
    assert curves.thin(points) == points


def test_a_trailing_mean_averages_the_last_values_and_keeps_what_is_not_finite() -> None:
    """Oracle: arithmetic by hand."""
    smooth = curves.trailing_mean(((1, 1.0), (2, 3.0), (3, math.inf), (4, 5.0)), 2)
    assert [y for _, y in smooth] == [1.0, 2.0, math.inf, 4.0]


@given(st.lists(st.floats(-1e6, 1e6), max_size=60), st.integers(1, 20))
def test_a_trailing_mean_is_the_mean_of_each_window(values: list[float], window: int) -> None:
    """Oracle: each window's mean, computed from the window alone."""
    points = tuple((float(step), value) for step, value in enumerate(values))
    expected = [statistics.fmean(values[max(0, end - window) : end]) for end in range(1, len(values) + 1)]
    smooth = [y for _, y in curves.trailing_mean(points, window)]
    assert smooth == pytest.approx(expected, rel=1e-9, abs=1e-6)


def test_a_spike_leaves_a_trailing_mean_with_its_window() -> None:
    """Oracle: the mean of ones, exactly, once the spike is out of the window."""
    points = tuple((float(step), 1e25 if step == 5 else 1.0) for step in range(40))
    assert [y for _, y in curves.trailing_mean(points, 8)][13:] == [1.0] * 27


@pytest.mark.parametrize("count", [1, 5, 12])
def test_every_name_of_the_legend_is_inside_the_picture(count: int) -> None:
    """Oracle: the position of each name, seven pixels a letter, against the picture's own size."""
    names = [f"seed {number} of a sweep" for number in range(count)] + ["long " * 40]
    svg = drawn(*(Series(name, ((0, 1.0), (1, 2.0)), index) for index, name in enumerate(names)))
    shown = [
        text for text in svg.iter(f"{SVG}text") if "seed" in (text.text or "") or "long" in (text.text or "")
    ]
    assert len(shown) == count + 1
    for text in shown:
        assert float(text.get("x", "0")) + 7 * len(text.text or "") <= figure.WIDTH
    heights = {text.get("y") for text in shown}
    assert int(svg.get("height", "0")) == figure.HEIGHT + 18 * (len(heights) - 1)


def test_resumes_are_marked_where_they_happened() -> None:
    """Oracle: the position of the dashed line between the ends of the axis."""
    svg = drawn(Series("a", ((0, 1.0), (100, 2.0))), marks=(Mark(50, "resume (exact)"),))
    (mark,) = [line for line in svg.iter(f"{SVG}line") if line.get("class") == "mark"]
    assert float(mark.get("x1", "0")) == pytest.approx((figure.LEFT + figure.WIDTH - figure.RIGHT) / 2)
    assert any(text.text == "resume (exact)" for text in svg.iter(f"{SVG}text"))


def test_an_axis_that_has_to_start_at_zero_does() -> None:
    """Oracle: a value of half the maximum is drawn near half the height."""
    svg = drawn(Series("a", ((0, 50.0), (1, 100.0))), from_zero=True)
    (_, middle), (_, top) = corners(svg)
    base = figure.HEIGHT - figure.BOTTOM
    assert base - middle == pytest.approx((base - top) / 2, abs=0.2)


def test_bars_lie_where_their_steps_are(tmp_path: Path) -> None:
    """Oracle: an axis of 60 steps; the launches of `fake_runs` are 0 to 20 and, resumed, 20 to 60; a ledger
    with one row, of steps 15 to 30."""
    root = fake_runs.finished(tmp_path / "<a>")
    row = Row("aten.index_put", None, "eager", "cpu", "fp32", None, "observed", 2, 15, 30, None, "list")
    ledger = Ledger("warn", rows=(row,), coverage=(Coverage("census", 2, 15, 30, (0,), 100, 5),))
    (root / "checkpoints" / "step-00000060" / "ledger.json").write_bytes(ledger.to_bytes())
    about = study([runs.read(root)], [None])
    made = [*pictures.launches(about), *pictures.kernels(about)]
    svgs = [ElementTree.fromstring(each.svg) for each in made if isinstance(each, Picture)]
    bars = [bar for svg in svgs for bar in svg.iter(f"{SVG}rect") if len(bar)]
    drawn = [(float(bar.get("x", 0)), float(bar.get("width", 0))) for bar in bars]
    step = (figure.WIDTH - figure.RIGHT - figure.LEFT) / 60
    expected = [(figure.LEFT + step * a, step * (b - a)) for a, b in ((0, 20), (20, 60), (15, 30))]
    assert drawn == [pytest.approx(pair, abs=0.1) for pair in expected]
    assert [bar[0].text for bar in bars][1] == "exact, steps 20 to 60"


def test_labels_from_a_run_folder_cannot_break_the_picture() -> None:
    """Oracle: an XML parser finds the hostile name as text."""
    svg = drawn(Series("</svg><script>", ((0, 1.0), (1, 2.0))), marks=(Mark(0, "a & <b>"),))
    assert {text.text for text in svg.iter(f"{SVG}text")} >= {"</svg><script>", "a & <b>"}


# what a run folder holds


def test_a_run_is_read_with_its_evaluations_and_resumes(tmp_path: Path) -> None:
    """Oracle: what was written."""
    run = runs.read(fake_runs.finished(tmp_path / "alpha"))
    assert (run.name, run.last_step, run.unit) == ("alpha", 60, "token")
    assert run.evaluation_names == ("loss", "bits_per_byte")
    assert [x for x, _ in run.evaluation("loss")] == [10, 20, 30, 40, 50, 60]
    assert [(one.kind, one.resumed_from, one.last) for one in facts.segments(run)] == [
        ("genesis", None, 20),
        ("exact", 20, 60),
    ]


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    """Oracle: the error tree; an empty report would look like a result."""
    with pytest.raises(UsageError, match="not a run folder"):
        runs.read(tmp_path)


def test_a_partial_last_line_is_left_out_and_said(tmp_path: Path) -> None:
    """Oracle: a line cut in the middle, as SIGKILL leaves it."""
    root = fake_runs.finished(tmp_path / "a")
    fake_runs.write_metrics(root, fake_runs.lines(60), '{"step": 61, "lo')
    run = runs.read(root)
    assert (run.last_step, run.partial, run.unreadable) == (60, True, 0)


def test_a_whole_line_that_is_no_json_is_counted(tmp_path: Path) -> None:
    """Oracle: one broken line among good ones."""
    root = fake_runs.finished(tmp_path / "a")
    text = (root / "metrics.jsonl").read_text().splitlines(keepends=True)
    (root / "metrics.jsonl").write_text("".join([*text[:10], "garbage\n", *text[11:]]))
    run = runs.read(root)
    assert run.unreadable == 1
    assert facts.missing_steps(run) == ["steps 11 to 11 have no line"]


@given(st.binary(max_size=400))
@settings(deadline=None)
def test_no_bytes_in_metrics_or_events_stop_a_report(data: bytes) -> None:
    """Oracle: any bytes at all; only whole JSON objects with a step become steps."""
    with tempfile.TemporaryDirectory() as folder:
        root = fake_runs.finished(Path(folder) / "a")
        (root / "metrics.jsonl").write_bytes(data)
        (root / "events").mkdir()
        (root / "events" / "rank-00000.jsonl").write_bytes(data)
        blocks = report.compose(study([runs.read(root)], [None]))
    assert isinstance(blocks[0], Heading)


@given(st.binary(max_size=300))
@settings(deadline=None)
def test_no_bytes_in_a_statement_stop_a_report(data: bytes) -> None:
    """Oracle: a statement that cannot be read becomes a problem with the checkpoint's name."""
    with tempfile.TemporaryDirectory() as folder:
        root = fake_runs.finished(Path(folder) / "a")
        bundle = root / "checkpoints" / "step-00000040" / "provenance" / "checkpoint.sigstore.json"
        bundle.write_bytes(data)
        run = runs.read(root)
    (broken,) = [one for one in run.checkpoints if one.facts is None]
    assert broken.name == "step-00000040"
    assert broken.problem


@given(st.data())
@settings(deadline=None)
def test_no_types_of_metrics_or_events_stop_a_report_or_a_frame(data: st.DataObject) -> None:
    """Oracle: JSON objects with the known names and any values."""
    names = ["step", "loss", "time", "evaluation", "tokens_per_s", "mfu", "level", "event", "x_per_s"]
    numbers = st.floats() | st.integers(-(2**63), 2**63)
    words = st.text(max_size=5) | st.sampled_from(["error", "failure"])
    leaves = numbers | st.none() | st.booleans() | words
    values = leaves | st.lists(leaves, max_size=2) | st.dictionaries(st.text(max_size=3), leaves, max_size=2)
    line = st.dictionaries(st.sampled_from(names), values)
    steps = st.builds(lambda step, rest: {**rest, "step": step, "level": "error"}, st.integers(1, 99), line)
    text = b"".join(
        orjson.dumps(made, option=orjson.OPT_APPEND_NEWLINE)
        for made in data.draw(st.lists(line | steps, max_size=6))
    )
    with tempfile.TemporaryDirectory() as folder:
        root = fake_runs.finished(Path(folder) / "a")
        (root / "metrics.jsonl").write_bytes(text)
        (root / "events").mkdir()
        (root / "events" / "rank-00000.jsonl").write_bytes(text)
        blocks = report.compose(study([runs.read(root)], [None]))
        frame.draw(Follower(root).look(1.8e9), 80)
    html.render(blocks, "")
    markdown.render(blocks)


# claims


def test_a_finished_run_is_said_to_be_finished(tmp_path: Path) -> None:
    """Oracle: train.steps of run.yaml and the last line."""
    ending = facts.ending(runs.read(fake_runs.finished(tmp_path / "a")))
    assert (ending.kind, ending.text) == ("good", "finished: 60 of 60 steps")


def test_a_run_that_was_killed_is_open_not_good(tmp_path: Path) -> None:
    """Oracle: fewer lines than train.steps."""
    root = fake_runs.finished(tmp_path / "a")
    fake_runs.write_metrics(root, fake_runs.lines(33))
    ending = facts.ending(runs.read(root))
    assert ending.kind == "open"
    assert "step 33 of 60" in ending.text


def test_a_run_that_went_nan_is_bad_and_its_last_state_is_named(tmp_path: Path) -> None:
    """Oracle: the non-finite folder that the trainer leaves."""
    root = fake_runs.finished(tmp_path / "a")
    fake_runs.write_metrics(root, fake_runs.lines(33))
    fake_runs.write_checkpoint(root, "nonfinite-step-00000033", fake_runs.predicate("a", 33))
    ending = facts.ending(runs.read(root))
    assert ending.kind == "bad"
    assert "nonfinite-step-00000033" in ending.text


def test_a_loss_that_is_null_is_bad(tmp_path: Path) -> None:
    """Oracle: orjson writes NaN as null."""
    root = fake_runs.finished(tmp_path / "a")
    made = fake_runs.lines(60)
    made[-1]["loss"] = None
    fake_runs.write_metrics(root, made)
    assert facts.ending(runs.read(root)).kind == "bad"


def test_a_failure_after_the_last_step_is_the_ending(tmp_path: Path) -> None:
    """Oracle: the event that the trainer writes for an uncaught error."""
    root = fake_runs.finished(tmp_path / "a")
    fake_runs.write_metrics(root, fake_runs.lines(30))
    event = {"time": fake_runs.START + 99, "level": "error", "event": "failure", "error": "out of memory"}
    fake_runs.write_events(root, [event])
    ending = facts.ending(runs.read(root))
    assert ending.kind == "bad"
    assert "out of memory" in ending.text


def test_a_failure_that_a_later_launch_overcame_is_no_ending(tmp_path: Path) -> None:
    """Oracle: the run finished afterwards; the failure stays in the list of errors."""
    root = fake_runs.finished(tmp_path / "a")
    fake_runs.write_events(
        root, [{"time": fake_runs.START, "level": "error", "event": "failure", "error": "x"}]
    )
    run = runs.read(root)
    assert facts.ending(run).kind == "good"
    assert len(run.incidents) == 1


def test_control_characters_of_a_run_folder_do_not_reach_the_terminal(tmp_path: Path) -> None:
    """Oracle: an escape sequence in a name and in an error."""
    root = fake_runs.finished(tmp_path / "a")
    fake_runs.write_checkpoint(root, "step-00000080", fake_runs.predicate("\x1b[2Jx", 80))
    fake_runs.write_events(root, [{"time": 1.0, "level": "error", "event": "e", "error": "\x1b]0;owned\x07"}])
    run = runs.read(root)
    assert "\x1b" not in run.name + run.incidents[0].text + report.summary(run)


def test_without_a_ledger_nothing_is_called_deterministic(tmp_path: Path) -> None:
    """Oracle: the words; absence of evidence is said as such."""
    told = facts.could_vary(runs.read(fake_runs.finished(tmp_path / "a")), UNKNOWN)
    assert "no observer looked for order-dependent kernels" in told


def test_rows_of_the_ledger_are_named_among_what_could_vary(tmp_path: Path) -> None:
    """Oracle: a ledger with one observed row in the newest checkpoint."""
    root = fake_runs.finished(tmp_path / "a")
    row = Row("aten.index_put", None, "eager", "cpu", "F32", None, "observed", 3, 1, 50, "index_add", "list")
    ledger = Ledger("warn", rows=(row,), coverage=(Coverage("census", 2, 1, 50, (0,), 100, 5),))
    (root / "checkpoints" / "step-00000060" / "ledger.json").write_bytes(ledger.to_bytes())
    run = runs.read(root)
    assert "order-dependent kernels ran: `aten.index_put` (observed)" in facts.could_vary(run, UNKNOWN)
    assert any("aten.index_put" in cell for cell in cells(report.compose(study([run], [None]))))


def rows_of(block: report.Block) -> Sequence[Sequence[str]]:
    """The rows of a table; none of anything else."""
    return block.rows if isinstance(block, Table) else ()


def cells(blocks: list[report.Block]) -> list[str]:
    """Every cell of every table."""
    return [cell for block in blocks if isinstance(block, Table) for row in block.rows for cell in row]


def test_seeds_get_a_mean_and_a_sample_deviation(tmp_path: Path) -> None:
    """Oracle: 1 and 3 have mean 2 and sample standard deviation √2."""
    both = [scored(tmp_path / f"s{seed}", 1.0 + 2 * seed, seed=seed) for seed in (0, 1)]
    assert facts.no_spread(both) is None
    rows = [list(row) for block in report.compose(study(both, [None] * 2)) for row in rows_of(block)]
    assert ["held-out score", "all runs", "2", "2.0000", "1.4142"] in [row[:5] for row in rows]


def test_runs_that_differ_in_more_than_the_seed_get_no_spread(tmp_path: Path) -> None:
    """Oracle: another number of steps."""
    both = [
        runs.read(fake_runs.finished(tmp_path / name, steps=steps)) for name, steps in (("a", 60), ("b", 40))
    ]
    assert facts.differing_settings(both) == [("train.steps", ["60", "40"])]
    assert "more than their seed" in (facts.no_spread(both) or "")


def test_runs_of_the_same_seed_get_no_spread(tmp_path: Path) -> None:
    """Oracle: two runs of seed 0; a spread of none would read as certainty."""
    both = [runs.read(fake_runs.finished(tmp_path / name)) for name in ("a", "b")]
    assert "the same seed" in (facts.no_spread(both) or "")


def test_settings_that_differ_are_written_as_yaml_has_them(tmp_path: Path) -> None:
    """Oracle: null and lists as in a config file."""
    both = [runs.read(fake_runs.finished(tmp_path / name)) for name in ("a", "b")]
    for run, extra in zip(both, ("null", "[x]"), strict=True):
        with (run.root / "run.yaml").open("a") as file:
            file.write(f"data:\n  files: {extra}\n")
    both = [runs.read(run.root) for run in both]
    assert facts.differing_settings(both) == [("data.files", ["null", '["x"]'])]


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    """Oracle: the folders; a run with a name of its own keeps it."""
    roots = [fake_runs.finished(tmp_path / place) for place in ("a/run", "b/run", "c/other")]
    found = runs.told_apart([runs.read(root) for root in roots])
    assert [run.name for run in found] == [str(roots[0]), str(roots[1]), "other"]


def test_a_run_whose_verification_failed_is_in_no_mean(tmp_path: Path) -> None:
    """Oracle: a third run, which failed, would move the mean of 1 and 3; it is named."""
    three = [scored(tmp_path / f"s{seed}", value, seed=seed) for seed, value in enumerate((1.0, 3.0, 50.0))]
    good, bad = Status("good", "verified"), Status("bad", "s2: FAILED")
    blocks = report.compose(study(three, [good, good, bad]))
    rows = [list(row) for block in blocks for row in rows_of(block)]
    assert ["held-out score", "all runs", "2", "2.0000", "1.4142"] in [row[:5] for row in rows]
    assert any(row[0] == "s2 (verification failed)" and "50.0000" in row for row in rows)
    notes = [item for block in blocks if isinstance(block, Bullets) for item in block.items]
    assert "left out, since their verification failed: s2" in notes
    assert "no run" in str(report.compose(study(three, [bad] * 3))).lower()


def test_a_run_that_was_cut_off_does_not_cut_the_mean_of_the_others(tmp_path: Path) -> None:
    """Oracle: the last step of each curve: 60 of the mean of two, 30 of the third, which is named."""
    made = [scored(tmp_path / f"s{seed}", 1.0, seed=seed) for seed in range(3)]
    fake_runs.write_metrics(tmp_path / "s2", fake_runs.lines(30))
    shown = pictures.loss_figure(study([*made[:2], runs.read(tmp_path / "s2")], [None] * 3)).series
    ends = {series.name: series.points[-1][0] for series in shown}
    assert ends == {"s2 (not finished)": 30, "all runs (mean of 2 runs)": 60}


def test_a_run_that_kept_no_state_but_its_last_is_told_from_that(tmp_path: Path) -> None:
    """Oracle: the statement of a run that became non-finite before its first checkpoint, verified by the
    command without a log, which it has none of; the words of its config, its place among the artefacts."""
    signer = run_folder.identity(tmp_path / "me")
    root = run_folder.build(tmp_path / "run", signer, steps=(10,), tweak=not_finite)
    (root / "checkpoints" / "step-00000010").rename(root / "checkpoints" / "nonfinite-step-00000010")
    shutil.rmtree(root / "log")
    keys = [str(tmp_path / f"me.{kind}.pub") for kind in ("ed25519", "p256")]
    assert cli.main(["report", str(root), "--out", str(tmp_path / "out"), "--key", *keys]) == 0
    page = (tmp_path / "out" / "report.md").read_text()
    assert "signed by no checkpoint: the run has none" in page
    assert "step\\_digests" not in page.partition("## Configs")[0]
    assert "| updates | 30 of 8 samples |" in page
    key = signer.ed25519_id[:16]
    assert re.search(rf"\| sample \| `nonfinite-step-00000010` \| nonfinite \|.*\(ed25519 {key}…\) \|", page)


def not_finite(_: int, facts: Predicate) -> None:
    """A sample run's checkpoint as the state before a loss that is not finite."""
    facts["outcome"] = "nonfinite"


def test_arms_without_a_finished_run_are_no_baseline_and_configs_are_shown_once(tmp_path: Path) -> None:
    """Oracle: a first arm that was cut off, then two finished ones of two seeds; one config each, and what
    the arms share told once; a verification that failed is no signature."""
    made = [
        scored(tmp_path / f"w{width}-{seed}", 2.0, seed=seed, settings=f"model: {{width: {width}}}\n")
        for width in (1, 2, 3)
        for seed in range(2)
    ]
    for run in made[:2]:
        fake_runs.write_metrics(run.root, fake_runs.lines(30))
    made = [runs.read(run.root) for run in made]
    verdicts = [*[Status("good", "verified")] * 5, Status("bad", "FAILED")]
    page = markdown.render(report.compose(study(made, verdicts)))
    assert "first arm with a finished run: model.width 2." in page
    assert "- model.width 1 is not compared: no run of it has finished" in page
    assert re.findall(r"<summary>(.*?)</summary>", page) == [
        f"w{width}-0: run.yaml; w{width}-1: the same but for run.dir, run.name, run.seed"
        for width in (1, 2, 3)
    ]
    assert page.count("| updates | 60 of — samples |") == 1
    (row,) = (line for line in page.splitlines() if line.startswith("| w3-1 | `step-"))
    assert row.endswith("| verification failed |")
    assert "- held-out score ended at 2 in all 3 runs" in page
    assert "energy not recorded" in page
    assert "energy of 0" not in page


def test_what_nobody_looked_at_is_not_told_as_seen_to_be_free_of_it(tmp_path: Path) -> None:
    """Oracle: determinism.mode off, a ledger of which says that no observer looked at any step; a run of two
    steps, which shows no pace."""
    root = tmp_path / "a"
    facts = fake_runs.predicate("a", 2)
    facts["determinism"]["mode"] = "off"
    fake_runs.write_checkpoint(root, "step-00000002", facts)
    fake_runs.write_metrics(root, fake_runs.lines(2))
    (root / "checkpoints" / "step-00000002" / "ledger.json").write_bytes(Ledger("off").to_bytes())
    page = markdown.render(report.compose(study([runs.read(root)], [None])))
    assert "Nobody has looked:" in page
    assert "None was seen" not in page
    assert "kernels without a fixed order were allowed, and not watched for" in page
    assert "Process hours are not recorded" in page


def test_a_resume_is_marked_where_its_run_has_a_curve(tmp_path: Path) -> None:
    """Oracle: both runs were resumed, and one was never evaluated; the labels of the marks."""
    roots = [fake_runs.finished(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    fake_runs.write_metrics(roots[1], fake_runs.lines(60, every=1000))
    (roots[1] / "run.yaml").write_text("train: {steps: 60}\nmodel: {width: 2}\n")
    shown = pictures.pictures(study([runs.read(root) for root in roots], [None] * 2))
    texts = {each.file: each.svg for each in shown if isinstance(each, Picture)}
    labels = {file: [name for name in "ab" if f"{name}: resume" in svg] for file, svg in texts.items()}
    # Both resumes are at one step, so that one label stands for both in the other pictures.
    assert labels == {"loss.svg": ["a"], "evaluation-loss.svg": ["a"], "evaluation-bits-per-byte.svg": ["a"],
                      "throughput.svg": ["a"]}  # fmt: skip
    marks = {file: svg.count('class="mark"') for file, svg in texts.items()}
    assert marks == {**dict.fromkeys(texts, 1), "loss.svg": 2, "throughput.svg": 2}


def test_what_was_measured_once_has_no_picture(tmp_path: Path) -> None:
    """Oracle: the score has one value, bits per byte have six; both are in the table."""
    blocks = report.compose(study([scored(tmp_path / "a", 1.0), scored(tmp_path / "b", 2.0)], [None] * 2))
    drawn = {block.file for block in blocks if isinstance(block, Picture)}
    assert "evaluation-bits-per-byte.svg" in drawn
    assert "evaluation-score.svg" not in drawn
    assert Paragraph("Measured once, so without a curve: held-out score.") in blocks


def test_a_figure_that_is_not_finite_is_not_averaged_away(tmp_path: Path) -> None:
    """Oracle: the count of what was averaged."""
    three = [scored(tmp_path / f"s{seed}", value, seed=seed) for seed, value in enumerate((1.0, 3.0, None))]
    rows = [list(row) for block in report.compose(study(three, [None] * 3)) for row in rows_of(block)]
    assert ["held-out score", "all runs", "2 of 3", "2.0000", "1.4142"] in [row[:5] for row in rows]


# pages


class Page(HTMLParser):
    """Tags and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]


def test_the_page_loads_nothing_and_runs_nothing(tmp_path: Path) -> None:
    """Oracle: an HTML parser: no script, no link or image of elsewhere; a policy that forbids them."""
    run = runs.read(fake_runs.finished(tmp_path / "a"))
    text = html.render(report.compose(study([run], [None])), "a")
    page = Page(text)
    assert page.tags.isdisjoint({"script", "link", "iframe", "img", "object", "embed"})
    assert all(link.startswith("#") for link in page.links)
    assert "default-src 'none'" in text
    assert not re.search(r"url\(|@import", text)


@given(st.text(max_size=60))
def test_any_text_is_shown_as_text_in_html(words: str) -> None:
    """Oracle: an HTML parser sees no tag beyond those of the block itself."""
    made = html.render([Paragraph(words), Source(words, words), Table([words], [[words]])], words)
    skeleton = html.render([Paragraph(""), Source("", ""), Table([""], [[""]])], "")
    assert Page(made).tags - {"code"} == Page(skeleton).tags


@given(st.text(max_size=60))
def test_no_text_breaks_a_markdown_table(words: str) -> None:
    """Oracle: three lines, each with two unescaped bars."""
    made = markdown.render([Table(["head"], [[words]])]).rstrip("\n").split("\n")
    assert len(made) == 3
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 2 for line in made)


def test_a_config_with_a_code_fence_stays_inside_its_own() -> None:
    """Oracle: the fence around it is longer."""
    assert "````\n```\nx\n````" in markdown.render([Source("t", "```\nx")])


@pytest.mark.skipif(browser.PROGRAM is None, reason="no Chromium is installed")
def test_a_browser_asks_for_nothing_else_and_nothing_overflows(tmp_path: Path) -> None:
    """Oracle: a real browser's requests, and the width of the page at that of a desktop, a phone and a sheet
    of paper; every word of a picture lies inside of it and can be read; printed, the configs are unfolded."""
    made = [scored(tmp_path / f"a-rather-long-name-of-a-run-{seed}", 1.0, seed=seed) for seed in range(2)]
    page = tmp_path / "report.html"
    failed = Status("bad", f"FAILED: other bytes than were signed: /a/{'long/path/' * 9}model.safetensors")
    page.write_text(html.render(report.compose(study(made, [None, failed])), "t"))
    cut = """[...document.querySelectorAll('figure text')].filter(e => e.getClientRects().length).map(e =>
        [e.getBoundingClientRect(), e.closest('svg').getBoundingClientRect(), e.textContent]).filter(
        ([a, b]) => a.left < b.left || a.right > b.right + 1 || a.bottom > b.bottom || a.height < 11).map(
        each => each[2])"""
    shown = "[...document.querySelectorAll('figure svg')].filter(e => e.getClientRects().length).length"
    window = Browser()
    try:
        for width in (1280, 390, 720):
            window.open(page, width)
            assert window.evaluate("document.documentElement.scrollWidth") <= width
            assert window.requests == [page.as_uri()]
            assert window.evaluate(cut) == []
            assert window.evaluate(shown) == window.evaluate("document.querySelectorAll('figure').length") > 2
            assert window.evaluate("document.querySelector('figure').scrollWidth") <= width
        window.call("Emulation.setEmulatedMedia", media="print")
        assert window.evaluate("document.documentElement.scrollWidth") <= width
        assert window.evaluate("document.querySelector('details pre').offsetHeight") > 0
    finally:
        window.close()


def test_what_nobody_has_verified_is_said_where_it_is_used(tmp_path: Path) -> None:
    """Oracle: a finished run of which only a verification would show an evaluation that has failed; with one
    the doubt is gone."""
    made = [scored(tmp_path / "a", 1.0)]
    for verdict, doubt in ((None, True), (Status("good", "verified"), False)):
        about = study(made, [verdict])
        (data,) = (item for item in checklist.items(about) if item.asked == "which data?")
        assert ("1 of 1 runs, as nobody has verified" in data.evidence) == doubt
        page = markdown.render(report.compose(about))
        assert ("a signed evaluation would have to say against these runs is not known" in page) == doubt
        assert "Nothing to list: every run that was given has finished." in page


def test_every_answer_of_the_checklist_links_to_a_section_that_is_there(tmp_path: Path) -> None:
    """Oracle: the ids of the page, and the names that GitHub gives to the headings of the Markdown."""
    made = report.compose(study([scored(tmp_path / "a", 1.0)], [None]))
    links = {cell for block in made if isinstance(block, Table) for row in block.rows for cell in row[3:]}
    targets = {link.target for link in links if isinstance(link, Link)}
    assert len(targets) > 8
    page, text = html.render(made, "t"), markdown.render(made)
    assert targets == set(re.findall(r'href="#([^"]+)"', page)) == set(re.findall(r"\]\(#([^)]+)\)", text))
    assert targets <= set(re.findall(r'<h2 id="([^"]+)">', page))
    assert targets <= {anchor(title) for title in re.findall(r"^## (.+)$", text, re.MULTILINE)}
    assert anchor("Conclusion and its limits") == "conclusion-and-its-limits"


def test_what_a_run_says_that_did_not_verify_answers_nothing(tmp_path: Path) -> None:
    """Oracle: of two runs with the same statements one fails; what was yes for both is so no longer."""
    both = [scored(tmp_path / name, 1.0) for name in ("a", "b")]
    good, bad = Status("good", "verified"), Status("bad", "b: FAILED")
    told = [
        {item.asked: (item.answer, item.evidence) for item in checklist.items(study(both, verdicts))}
        for verdicts in ([good, good], [good, bad])
    ]
    for asked in ("which code?", "which data?", "the trained model"):
        assert [each[asked][0] for each in told] == ["yes", "no"], asked
    assert "1 of 2 runs" in told[1]["which data?"][1]


@pytest.mark.parametrize(
    ("code", "answer"),
    [
        ({}, "yes"),
        ({"dirty": True, "diff_sha256": "a" * 64}, "no"),
        ({"git_commit": None, "dirty": None}, "not recorded"),
    ],
)
def test_which_code_it_was_is_answered_from_the_statement(
    tmp_path: Path, code: dict[str, Any], answer: str
) -> None:
    """Oracle: a clean checkout, one with changes, and none."""
    facts = fake_runs.predicate("a", 20)
    facts["code"] |= code
    fake_runs.write_metrics(tmp_path, fake_runs.lines(20))
    fake_runs.write_checkpoint(tmp_path, "step-00000020", facts)
    found = {item.asked: item.answer for item in checklist.items(study([runs.read(tmp_path)], [None]))}
    assert (found["which code?"], found["the training code, as it was"]) == (answer, answer)


def test_whatever_went_wrong_is_among_the_failures(tmp_path: Path) -> None:
    """Oracle: a run that ended in NaN, one that was killed, one that does not verify, one whose evaluation
    has failed; a member that never began."""
    broken, killed = tmp_path / "broken", tmp_path / "killed"
    for root, last in ((broken, None), (killed, 2.0)):
        root.mkdir()
        (root / "run.yaml").write_text("train:\n  steps: 60\n")
        fake_runs.write_metrics(root, [*fake_runs.lines(29), {"step": 30, "loss": last}])
    facts = {"result": "FAILED", "failedTests": ["score at least 2"]}
    failed = runs.Evaluated("step-00000060", "test-result-0", "0" * 64, 60, "me", facts)
    scored(tmp_path / "tampered", 1.0)
    scored(tmp_path / "poor", 1.0, seed=1)
    made = [runs.read(broken), runs.read(killed), runs.read(tmp_path / "tampered")]
    made.append(dataclasses.replace(runs.read(tmp_path / "poor"), evaluated=(failed,)))
    verdicts = [None, None, Status("bad", "tampered: FAILED"), Status("good", "poor: verified")]
    blocks = report.compose(study(made, verdicts, absent=["seed-4"]))
    at = blocks.index(Heading(2, "Failures and negative results"))
    listed = blocks[at + 1]
    assert isinstance(listed, Bullets)
    words = ["broken: the loss was not finite", "killed: not finished", "seed-4", "tampered: FAILED",
             "an evaluation has failed: score at least 2"]  # fmt: skip
    assert len(listed.items) == len(words)
    assert all(word in item for word, item in zip(words, listed.items, strict=True)), listed.items


def test_arms_that_differ_in_many_settings_go_by_the_names_of_their_runs(tmp_path: Path) -> None:
    """Oracle: two arms of two runs, whose settings in one line would be cut to the same words in a legend."""
    made = [
        scored(tmp_path / f"{name}-{seed}", 1.0, seed=seed, settings=f"model:\n  width: {name}\n{same}")
        for name in ("narrow", "wide")
        for seed in range(2)
        for same in ["".join(f"  a_setting_with_a_long_name_{n}: {name}\n" for n in range(4))]
    ]
    assert [arm.label for arm in study(made, [None] * 4).arms] == ["narrow-0, narrow-1", "wide-0, wide-1"]


def test_a_run_that_was_better_before_its_end_is_noted(tmp_path: Path) -> None:
    """Oracle: bits per byte fall by the formula of `fake_runs` up to step 50 and jump at the last step."""
    run = scored(tmp_path / "a", 1.0)
    fake_runs.finished(tmp_path / "b", figures={"bits_per_byte": 9.0})
    notes = [
        item
        for block in report.compose(study([run, runs.read(tmp_path / "b")], [None] * 2))
        if isinstance(block, Bullets)
        for item in block.items
        if "lowest at step" in item
    ]
    best = (2 + 3 * 0.97**50) * 1.4427
    assert notes == [f"b: held-out bits_per_byte was lowest at step 50, {best:.4g}; at the end it was 9"]


def test_the_title_of_a_folded_text_is_no_markup() -> None:
    """Oracle: HTML has no tag there but those of the fold, whatever backslashes mean elsewhere."""
    made = markdown.render([Source("<img src=x onerror='alert(1)'>`<b>`", "x")])
    assert re.findall("<[^>]*>", made) == ["<details>", "<summary>", "</summary>", "</details>"]


def test_a_status_says_in_words_and_sign_what_its_colour_says() -> None:
    """Oracle: both renderings."""
    assert markdown.render([Status("bad", "it failed")]) == "> ✘ **it failed**\n"
    assert 'class="status bad"' in html.render([Status("bad", "it failed")], "t")


# the command


def test_the_command_writes_the_report_and_its_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the files, and the paths that were printed."""
    root, out = fake_runs.finished(tmp_path / "a"), tmp_path / "out"
    assert cli.main(["report", str(root), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"loss curve: {out}/loss.svg" in printed
    assert "not verified" in (out / "report.md").read_text()
    names = {path.name for path in out.iterdir()}
    svgs = {"loss.svg", "evaluation-bits-per-byte.svg", "throughput.svg", "launches.svg"}
    assert names == {"report.md", "report.html", *svgs}
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", (out / "report.md").read_text())
    assert set(pictures) == svgs
    for name in names:
        if name.endswith(".svg"):
            ElementTree.parse(out / name)


def test_the_json_of_the_command_is_one_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: a JSON parser; verification is never implied."""
    root = fake_runs.finished(tmp_path / "a")
    assert cli.main(["report", str(root), "--out", str(tmp_path / "out"), "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)["runs"]
    assert (told["run"], told["last_step"], told["verification"]) == ("a", 60, "not verified")


def test_an_evaluation_cannot_choose_a_file_outside_the_folder(tmp_path: Path) -> None:
    """Oracle: a name with slashes in metrics.jsonl."""
    root = fake_runs.finished(tmp_path / "a")
    made = fake_runs.lines(60)
    made[-1]["evaluation"] = {"../../escape": 1.0}
    fake_runs.write_metrics(root, made)
    assert cli.main(["report", str(root), "--out", str(tmp_path / "x" / "out")]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"a", "x"}
    assert {path.name for path in (tmp_path / "x").iterdir()} == {"out"}


def test_a_report_says_when_and_by_what_it_was_made_and_can_be_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: 1,000,000,000 s of Unix time; the files of two reports; a variable that is no time is usage."""
    root = fake_runs.finished(tmp_path / "a")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1000000000")
    for name in ("one", "two"):
        assert cli.main(["report", str(root), "--out", str(tmp_path / name)]) == 0
    page = (tmp_path / "one" / "report.md").read_text()
    assert page.split("\n\n")[1] == f"Made at 2001-09-09T01:46:40Z by harness {harness.__version__}."
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "soon")
    capsys.readouterr()
    assert cli.main(["report", str(root), "--out", str(tmp_path / "three")]) == 2
    assert "'soon' is no time: $SOURCE_DATE_EPOCH; give whole seconds" in capsys.readouterr().err
