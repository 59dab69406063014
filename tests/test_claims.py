"""Claims in a file, and what runs make of them: a claim never says more than its evidence without a mark."""

from __future__ import annotations

import dataclasses
import hashlib
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fake_runs
import later_facts
import orjson
import pytest
import run_folder
from attack import trusted
from run_folder import SampleRun

from harness import cli
from harness.audit import attest
from harness.audit.folders import opening
from harness.errors import ConfigError
from harness.provenance import later
from harness.report import argument, claim_file, judge, markdown, report, runs
from harness.report.document import Bullets, Heading, Status, Table
from harness.report.judge import Judged
from harness.report.runs import Evaluated, Run
from harness.report.study import study

GOOD = Status("good", "verified")


def claimed(body: str, scope: str = "{seeds: any}", metric: str = "score") -> claim_file.Claims:
    """One claim about the figure ``metric``."""
    text = (
        "format: harness-claims/1\nclaims:\n"
        f"  - {{name: it, says: It is so., metric: {metric}, for: {scope}, "
        f"of: {{optimizer.lr: 3}}, {body}}}\n"
    )
    return claim_file.parse(text, where="claims.yaml")


HIGHER = "than: {optimizer.lr: 1}, better: higher, by: 0.5"


def arm(folder: Path, lr: int, scores: Sequence[float | None]) -> list[Run]:
    """Finished runs with the seeds 0, 1, … and these last scores."""
    made = []
    for seed, score in enumerate(scores):
        root = folder / f"lr-{lr}-seed-{seed}"
        fake_runs.finished(root, seed=seed, settings=f"optimizer:\n  lr: {lr}\n", figures={"score": score})
        made.append(runs.read(root))
    return made


def told(claims: claim_file.Claims, made: list[Run], verdict: Status | None = GOOD) -> Judged:
    """The verdict on the only claim."""
    (found,) = judge.judge(claims.claims, made, [verdict] * len(made))
    return found


FIVE = [5.0, 5.1, 4.9, 5.05, 4.95]
"""Scores with a mean of 5 and little spread."""


def shifted(by: float) -> list[float]:
    """`FIVE`, lower, with other noise."""
    return [value - by + noise for value, noise in zip(FIVE, (0.02, -0.03, 0.01, 0.02, -0.02), strict=True)]


@pytest.mark.parametrize(
    ("by", "verdict", "kind"),
    [(1, "supported", "good"), (0.5, "undecided", "open"), (0, "not supported", "bad")],
)
def test_a_report_says_before_all_else_what_became_of_its_claims(
    tmp_path: Path, by: float, verdict: str, kind: str
) -> None:
    """Oracle: arms that differ by more than the margin, by as much, and by nothing; the first screen."""
    made = arm(tmp_path, 3, FIVE) + arm(tmp_path, 1, shifted(by))
    blocks = report.compose(study(made, [GOOD] * len(made), claimed(HIGHER)))
    begins = next(at for at, each in enumerate(blocks) if isinstance(each, Heading) and each.level == 2)
    assert blocks[begins - 1] == Status(kind, f"claims: 1 {verdict}")


def on(run: Run, corpus: str) -> Run:
    """``run``, trained and measured on another corpus."""
    changed = [
        dataclasses.replace(
            each, facts={**each.facts, "data": {**each.facts["data"], "corpus_sha256": corpus}}
        )
        for each in run.checkpoints
        if each.facts is not None
    ]
    return dataclasses.replace(run, checkpoints=tuple(changed))


def test_figures_of_other_data_are_not_compared_and_bear_no_claim_of_any_data(tmp_path: Path) -> None:
    """Oracle: the second arm has another corpus, hence another held-out split; with one corpus a row for the
    same figures, and the same claim supported."""
    high, low = arm(tmp_path, 3, FIVE), arm(tmp_path, 1, shifted(1))
    for made, apart in (([*high, *low], False), ([*high, *(on(run, "b" * 64) for run in low)], True)):
        about = study(made, [GOOD] * len(made), claimed(HIGHER))
        page = markdown.render(report.compose(about))
        assert ("say nothing of each other" in page) == apart
        assert ("\n| held-out score | optimizer.lr 1 | -" in page) != apart
        assert (
            "held-out score: optimizer.lr 1 and optimizer.lr 3 were measured on different" in page
        ) == apart
        assert ("- held-out score ended between" in page) != apart
        assert (about.judged[0].reasons == ("its runs have 2 different corpora",)) == apart
        anywhere = told(claimed(HIGHER, "{seeds: any, data: any}"), made)
        assert ("its figures are of other data on one side than on the other" in anywhere.reasons) == apart


def test_a_margin_that_lies_outside_the_interval_is_supported(tmp_path: Path) -> None:
    """Oracle: arms that differ by 1 with a spread of 0.02; the margin is 0.5."""
    found = told(claimed(HIGHER), arm(tmp_path, 3, FIVE) + arm(tmp_path, 1, shifted(1)))
    assert (found.verdict, found.reasons) == ("supported", ())
    assert "the seeds 0 to 4" in (found.narrower or "")


def test_a_difference_on_the_wrong_side_is_not_supported(tmp_path: Path) -> None:
    """Oracle: the same numbers, the arms exchanged."""
    assert (
        told(claimed(HIGHER), arm(tmp_path, 3, shifted(1)) + arm(tmp_path, 1, FIVE)).verdict
        == "not supported"
    )


def test_a_margin_inside_the_noise_is_undecided_and_says_how_many_seeds_it_takes(tmp_path: Path) -> None:
    """Oracle: differences 0.1 to 1.1, around the margin of 0.5; more seeds than the five there are."""
    low = [value - by for value, by in zip(FIVE, (0.1, 1.1, 0.6, 0.8, 0.3), strict=True)]
    found = told(claimed(HIGHER), arm(tmp_path, 3, FIVE) + arm(tmp_path, 1, low))
    assert found.verdict == "undecided"
    assert found.seeds_needed is not None
    assert found.seeds_needed > 5


def test_equal_results_are_no_improvement(tmp_path: Path) -> None:
    """Oracle: identical scores; nothing varies, so no interval hides it."""
    body = "than: {optimizer.lr: 1}, better: higher"
    assert told(claimed(body), arm(tmp_path, 3, FIVE) + arm(tmp_path, 1, FIVE)).verdict == "not supported"


def test_a_claim_over_lines_that_no_checkpoint_has_signed_is_too_broad(tmp_path: Path) -> None:
    """Oracle: the same runs with signed lines support it."""
    runs = arm(tmp_path, 3, FIVE)
    assert told(claimed("at_least: 4.0"), runs).verdict == "supported"
    bare = [dataclasses.replace(run, verified=True, lines_signed=False) for run in runs]
    found = told(claimed("at_least: 4.0"), bare)
    assert (found.verdict, "no checkpoint has signed" in found.reasons[0]) == ("too broad", True)


@pytest.mark.parametrize(
    ("scope", "count", "verdict", "reason"),
    [
        ("{seeds: any}", 1, GOOD, "it speaks of any seed, and 1 seed ran"),
        ("{seeds: any}", 4, GOOD, "it speaks of any seed, and 4 seeds ran"),
        ("{data: any}", 5, GOOD, "it speaks of any data, and one corpus was used"),
        ("{stack: any}", 5, GOOD, "it speaks of any stack, and one stack was used"),
        ("{seeds: any}", 5, None, "10 runs not verified"),
        ("{seeds: any}", 5, Status("bad", "FAILED"), "10 runs not verified"),
    ],
)
def test_a_claim_broader_than_its_evidence_is_marked_and_narrowed(
    tmp_path: Path, scope: str, count: int, verdict: Status | None, reason: str
) -> None:
    """Oracle: the one thing that was taken away."""
    made = arm(tmp_path, 3, FIVE[:count]) + arm(tmp_path, 1, shifted(1)[:count])
    found = told(claimed(HIGHER, scope), made, verdict)
    assert found.verdict == "too broad"
    assert any(reason in text for text in found.reasons)
    assert found.narrower is not None


def test_a_claim_about_these_very_runs_needs_no_inference(tmp_path: Path) -> None:
    """Oracle: one seed each, 5 against 3.98."""
    made = arm(tmp_path, 3, FIVE[:1]) + arm(tmp_path, 1, shifted(1)[:1])
    assert told(claimed(HIGHER, "{seeds: these}"), made).verdict == "supported"


def test_runs_that_differ_in_more_than_the_claim_says_are_named(tmp_path: Path) -> None:
    """Oracle: one arm has fewer steps too."""
    made = arm(tmp_path, 3, FIVE)
    for seed, score in enumerate(shifted(1)):
        root = tmp_path / f"short-{seed}"
        fake_runs.finished(
            root, steps=40, seed=seed, settings="optimizer:\n  lr: 1\n", figures={"score": score}
        )
        made.append(runs.read(root))
    found = told(claimed(HIGHER), made)
    assert found.verdict == "too broad"
    assert any("train.steps" in text for text in found.reasons)


def test_a_run_that_did_not_finish_is_counted_not_dropped(tmp_path: Path) -> None:
    """Oracle: one of six runs was cut off."""
    made = arm(tmp_path, 3, [*FIVE, 5.0]) + arm(tmp_path, 1, [*shifted(1), 4.0])
    broken = tmp_path / "lr-3-seed-5"
    fake_runs.write_metrics(broken, fake_runs.lines(30))
    made = [runs.read(run.root) for run in made]
    found = told(claimed(HIGHER), made)
    assert found.verdict == "too broad"
    assert any("1 of 12 runs did not finish" in text for text in found.reasons)


def answers(value: float, *, step: int = 60, **change: Any) -> Evaluated:
    """A signed evaluation with this ``exact_match``; ``change``: fields of ``harness_evaluation``."""
    facts = later_facts.test_result()
    facts["harness_evaluation"] |= {"metrics": {"exact_match": str(value)}, **change}
    digest = hashlib.sha256(orjson.dumps(facts)).hexdigest()
    return Evaluated(f"step-{step:08d}", "test-result-0", digest, step, "me", facts)


def answered(made: list[Run], values: list[float], **change: Any) -> list[Run]:
    """``made``, each with such an evaluation."""
    return [
        dataclasses.replace(run, evaluated=(answers(value, **change),))
        for run, value in zip(made, values, strict=True)
    ]


OTHER = {"name": "other", "split": "held-out", "sha256": "a" * 64}
NEWER = {"name": "teacher forcing", "version": "2", "settings": {"context": 256}}


@pytest.mark.parametrize(
    ("scope", "count", "spread", "change", "says"),
    [
        ("{}", 5, 0.01, {}, ("supported", "")),
        ("{}", 1, 0.01, {}, ("too broad", "it speaks of any seed, and 1 seed ran")),
        ("{}", 5, 3.0, {}, ("undecided", "does not exclude the margin")),
        ("{data: any}", 5, 0.01, {}, ("too broad", "it speaks of any data, and one dataset was evaluated")),
        ("{}", 5, 0.01, {"dataset": OTHER}, ("no evidence", "asked different things, in dataset, sha256")),
        ("{data: any}", 5, 0.01, {"dataset": OTHER}, ("no evidence", "asked different things, in dataset")),
        ("{}", 5, 0.01, {"decoding": {}}, ("no evidence", "in decoding.max_tokens, decoding.temperature")),
        ("{}", 5, 0.01, {"procedure": NEWER}, ("too broad", "its evaluations differ in version")),
        ("{}", 5, 0.01, {"step": 40}, ("no evidence", "no verified evaluation of step 60 has it")),
    ],
)
def test_a_claim_about_signed_evaluations_is_held_to_the_same_checks(
    tmp_path: Path, scope: str, count: int, spread: float, change: dict[str, Any], says: tuple[str, str]
) -> None:
    """Oracle: two arms that differ by 1; one thing taken away, or the second arm measured differently."""
    noise = [spread * each for each in (0.1, -0.2, 0.3, -0.1, 0.05)][:count]
    made = answered(arm(tmp_path, 3, FIVE[:count]), [5.0 + each for each in noise])
    made += answered(arm(tmp_path, 1, FIVE[:count]), [4.0 - 2 * each for each in noise], **change)
    found = told(claimed(HIGHER, scope, "exact_match"), made)
    assert found.verdict == says[0], found.reasons
    assert says[1] in "; ".join(found.reasons)
    assert (says[0] == "supported") == (found.reasons == ())
    used = {each.sha256 for run in made for each in run.evaluated} if says[0] != "no evidence" else set()
    assert {each.sha256 for _, each in found.evidence} == used


def test_suites_may_differ_from_seed_to_seed_where_a_claim_speaks_of_any_data(tmp_path: Path) -> None:
    """Oracle: seeds 0 to 2 on one suite, 3 and 4 on another, alike in both arms; then one exchanged."""
    made = answered(arm(tmp_path, 3, FIVE), FIVE) + answered(arm(tmp_path, 1, FIVE), shifted(1))
    mixed = [
        dataclasses.replace(run, evaluated=(answers(one.metrics["exact_match"], dataset=OTHER),))
        if number % 5 > 2
        else run
        for number, run in enumerate(made)
        for one in run.evaluated
    ]
    claim = claimed(HIGHER, "{data: any}", "exact_match")
    assert told(claim, mixed).reasons == ("it speaks of any data, and one corpus was used",)
    assert told(claim, [*mixed[:4], made[4], *mixed[5:]]).verdict == "no evidence"


def test_signed_evaluations_are_in_the_tables_over_seeds(tmp_path: Path) -> None:
    """Oracle: means and differences by hand, of five seeds an arm, one without an evaluation; a second
    question that one arm alone was asked has a name of its own and is not compared."""
    low = shifted(1)
    wide, narrow = answered(arm(tmp_path, 3, FIVE), FIVE), answered(arm(tmp_path, 1, FIVE), low)
    narrow[4] = dataclasses.replace(narrow[4], evaluated=())
    wide = [
        dataclasses.replace(run, evaluated=(*run.evaluated, answers(0.5, decoding={"temperature": "0.0"})))
        for run in wide
    ]
    about = study([*wide, *narrow], [GOOD] * 10)
    blocks = [*argument.uncertainty(about), *argument.comparison(about)]
    rows = [row for block in blocks if isinstance(block, Table) for row in block.rows if "wheel" in row[0]]
    notes = [item for block in blocks if isinstance(block, Bullets) for item in block.items]
    limited, free = (f"exact_match (wheel, held-out; max_tokens {tokens})" for tokens in ("0", "—"))
    assert [[*row[:3], row[3][:6]] for row in rows[:3]] == [
        [limited, "optimizer.lr 3", "5", "5.0000"],
        [limited, "optimizer.lr 1", "4 of 5", f"{statistics.fmean(low[:4]):.4f}"],
        [free, "optimizer.lr 3", "5", "0.5000"],
    ]
    difference = statistics.fmean(low[:4]) - statistics.fmean(FIVE)
    assert [row[:3] for row in rows[3:]] == [[limited, "optimizer.lr 1", f"{difference:+.4g}"]]
    assert notes == [
        f"{limited}, optimizer.lr 1: seed 4 left out: no verified evaluation of step 60 has it",
        f"not compared: {free}: optimizer.lr 3 has values, optimizer.lr 1 has none "
        "(what is verified of step 60 was asked something else)",
    ]


def test_which_of_several_evaluations_is_meant_must_be_said(tmp_path: Path) -> None:
    """Oracle: two suites a run; named, the one is a level above and the other below; the same one twice."""
    made = answered(arm(tmp_path, 3, FIVE), [0.8, 0.81, 0.79, 0.8, 0.8])
    both = [
        dataclasses.replace(run, evaluated=(*run.evaluated, answers(0.1 + n / 100, dataset=OTHER)))
        for n, run in enumerate(made)
    ]
    level = "at_least: 0.5"
    lost = told(claimed(level, metric="exact_match"), both)
    assert (lost.verdict, "2 evaluations that differ in dataset, sha256" in lost.reasons[0]) == (
        "no evidence",
        True,
    )
    for name, verdict in {"wheel": "supported", "other": "not supported", "absent": "no evidence"}.items():
        body = f"{level}, evaluation: {{dataset: {name}}}"
        assert told(claimed(body, metric="exact_match"), both).verdict == verdict
    absent = told(claimed(f"{level}, evaluation: {{dataset: absent}}", metric="exact_match"), both)
    assert "what is verified of step 60 is of dataset other, wheel, not absent" in absent.reasons[0]
    again = [dataclasses.replace(run, evaluated=(*run.evaluated, answers(0.7))) for run in made]
    twice = told(claimed(level, metric="exact_match"), again)
    assert (twice.verdict, "it was measured 2 times, from 0.7 to 0.8" in twice.reasons[0]) == (
        "too broad",
        True,
    )


def test_a_finished_run_without_the_figure_is_counted_not_dropped(tmp_path: Path) -> None:
    """Oracle: one of eleven runs diverged in its last evaluation, which metrics.jsonl writes as null."""
    made = arm(tmp_path, 3, [*FIVE, None]) + arm(tmp_path, 1, shifted(1))
    found = told(claimed(HIGHER), made)
    assert found.verdict == "too broad"
    assert any("1 of 11 runs finished without a value of score" in text for text in found.reasons)


def test_a_sweep_of_which_members_never_began_supports_no_claim_as_it_is(tmp_path: Path) -> None:
    """Oracle: the same runs support it where nothing else was planned."""
    made = arm(tmp_path, 3, FIVE) + arm(tmp_path, 1, shifted(1))
    claims = claimed(HIGHER)
    (whole,) = study(made, [GOOD] * 10, claims).judged
    (part,) = study(made, [GOOD] * 10, claims, absent=["seed-5", "seed-6"]).judged
    assert (whole.verdict, part.verdict) == ("supported", "too broad")
    assert part.reasons == ("2 planned runs never began: seed-5, seed-6",)


def test_only_evaluations_that_were_verified_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: `harness report` of one signed run: no key, a stranger's evaluation, then the maker's own."""
    run = SampleRun(tmp_path / "run", run_folder.identity(tmp_path / "me"))
    run.advance(30)
    (tmp_path / "claims.yaml").write_text(
        "format: harness-claims/1\nclaims:\n  - {name: right, says: It answers., metric: exact_match, "
        "at_least: 0.5, of: {run.seed: 3}, for: {seeds: these}}\n"
    )
    words = ["report", str(run.root), "--out", str(tmp_path / "out"), "--json"]
    words += ["--claims", str(tmp_path / "claims.yaml")]

    def verdict(*key: str) -> tuple[int, str, list[str]]:
        code = cli.main([*words, *key])
        (claim,) = orjson.loads(capsys.readouterr().out)["claims"]
        return code, claim["verdict"], claim["reasons"]

    opened = opening.open_checkpoint(run.saved[30].folder, trusted(run.signer))
    attest.add(opened, later.TEST_RESULT, answers(0.75).facts, run.signer)
    keys = ["--key", f"{tmp_path}/me.ed25519.pub", f"{tmp_path}/me.p256.pub"]
    assert verdict()[:2] == (0, "no evidence")
    assert verdict(*keys)[:2] == (0, "supported")
    added = run.saved[30].folder / "provenance" / "test-result-0.sigstore.json"
    digest = hashlib.sha256(added.read_bytes()).hexdigest()
    page = (tmp_path / "out" / "report.md").read_text()
    assert "the mean exact match of run.seed 3 was 0.75" in page
    assert f"that it rests on, by sha256: sample `{digest[:12]}`" in page
    assert f"| test-result-0 | `{digest[:12]}` |" in page
    added.write_bytes(added.read_bytes().replace(b"signatures", b"signaturez"))
    code, said, reasons = verdict(*keys)
    assert (code, said) == (1, "no evidence"), reasons


@pytest.mark.parametrize(
    ("level", "verdict"), [("at_least: 4.0", "supported"), ("at_most: 4.0", "not supported")]
)
def test_a_level_is_held_against_the_interval_of_the_mean(tmp_path: Path, level: str, verdict: str) -> None:
    """Oracle: five scores around 5."""
    assert told(claimed(level), arm(tmp_path, 3, FIVE)).verdict == verdict


def test_a_claim_without_runs_has_no_evidence(tmp_path: Path) -> None:
    """Oracle: no run has that setting."""
    assert told(claimed(HIGHER), arm(tmp_path, 3, FIVE)).verdict == "no evidence"


def test_many_claims_share_one_error_rate(tmp_path: Path) -> None:
    """Oracle: Bonferroni."""
    claims = claimed("at_least: 4.0").claims * 10
    found = judge.judge(claims, arm(tmp_path, 3, FIVE), [GOOD] * 5)
    assert [one.interval.level for one in found if one.interval] == [pytest.approx(0.995)] * 10


ONE = "{name: a, says: b, metric: c, of: {}"


@pytest.mark.parametrize(
    ("claims", "message"),
    [
        ("[]", "claims is no list"),
        ("[{name: a}]", "a claim has no `says`"),
        (f"[{ONE}, at_mots: 1}}]", "unknown key `at_mots`"),
        (f"[{ONE}}}]", "exactly one of than"),
        (f"[{ONE}, at_most: high}}]", "no number"),
        (f"[{ONE}, than: {{}}, better: lower}}]", "compares runs with themselves"),
        (f"[{ONE}, at_most: 1, for: {{seeds: all}}}}]", "not any or these"),
        (f"[{ONE}, at_most: 1}}, {ONE}, at_least: 1}}]", "two claims have the same name"),
    ],
)
def test_a_file_that_is_not_understood_is_an_error_with_its_line(claims: str, message: str) -> None:
    """Oracle: the word that is wrong; a misspelt rule never means "no rule"."""
    with pytest.raises(ConfigError, match=message) as caught:
        claim_file.parse(f"format: harness-claims/1\nclaims: {claims}\n", where="claims.yaml")
    assert (caught.value.where or "").startswith("claims.yaml:")


def test_the_report_prints_each_claim_with_its_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the command's JSON, and the page that it wrote; nothing is verified, so it is too broad."""
    arm(tmp_path, 3, FIVE)
    (tmp_path / "claims.yaml").write_text(
        "format: harness-claims/1\nquestion: Is it good?\nclaims:\n"
        "  - {name: good, says: It reaches four., metric: score, at_least: 4.0, of: {optimizer.lr: 3}}\n"
    )
    folders = [str(tmp_path / f"lr-3-seed-{seed}") for seed in range(5)]
    words = [
        "report",
        *folders,
        "--out",
        str(tmp_path / "out"),
        "--claims",
        str(tmp_path / "claims.yaml"),
        "--json",
    ]
    assert cli.main(words) == 0
    document = orjson.loads(capsys.readouterr().out)
    assert [(one["name"], one["verdict"]) for one in document["claims"]] == [("good", "too broad")]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Is it good?" in page
    assert "too broad: It reaches four." in page
