"""`harness replay --against`: where the records of two runs part, found by bisection and executed again."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import run_folder
import toy_task
from conftest import Place
from hypothesis import given
from hypothesis import strategies as st
from test_replay import PLANTED, SECTIONS, replay

from harness import cli
from harness.audit.replay import divergence, segment
from harness.audit.replay.segment import Step
from harness.commands import reexecute
from harness.commands import replay as command
from harness.errors import EvidenceIncomplete, UsageError
from harness.format.layout import RunFolder
from harness.provenance.policy import rules as policies


def record(count: int, parts_at: int) -> dict[int, Step]:
    """Heads that are others from a step on."""
    facts: list[dict[str, Any]] = [
        {"chain": f"{step} {step >= parts_at}", "loss": 1.0 + (step >= parts_at), "batch": "b"}
        for step in range(1, count + 1)
    ]
    return {step: Step(step, line) for step, line in enumerate(facts, start=1)}


@given(st.integers(1, 1000))
def test_of_a_thousand_steps_the_first_that_differs_takes_ten_comparisons(place: int) -> None:
    """Oracle: the step that was chosen; log2 of the steps, rounded up."""
    found, queries = divergence.between(record(1000, 1001), record(1000, place))
    assert found is not None
    assert (found.step, found.parts) == (place, ("loss",))
    assert queries <= 10


def made_by(definition: str | None, **changed: Any) -> Any:
    """A checkpoint as far as its launch goes, whose steps were digested as ``definition`` says."""
    launch = dict.fromkeys(segment._SAME_LAUNCH, "same") | changed
    settings = {} if definition is None else {"step_digests": definition}
    predicate = dict.fromkeys(("config", "code", "data"), "same") | {
        "launch": launch, "environment": {}, "determinism": {"settings": settings},
    }  # fmt: skip
    return SimpleNamespace(
        statement=SimpleNamespace(predicate=predicate, step_to=4), folder=Path("step-00000008")
    )


def test_a_segment_is_of_one_launch_and_one_definition_of_digests() -> None:
    """Oracle: what was changed between two checkpoints, by name."""
    segment._refuse_change([made_by("two"), made_by("two")])
    for other, named in (
        (made_by("three"), "definition of the step digests"),
        (made_by(None), "definition of the step digests"),
        (made_by("two", precision="other"), "precision"),
    ):
        with pytest.raises(EvidenceIncomplete, match=f"the launch changed after step 4: {named}"):
            segment._refuse_change([made_by("two"), other])


def test_runs_whose_steps_were_digested_otherwise_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: both definitions are named; the same one goes on to the steps, which are equal here."""
    known = segment.Authentic(RunFolder(Path("a")), (made_by("two"),), record(3, 4))
    asked = argparse.Namespace(against=Path("b"), random=None, first=None, last=None)
    for definition, error, told in (
        ("three", EvidenceIncomplete, "digested as two, those of the other as three"),
        ("two", UsageError, "equal in the 3 steps"),
    ):
        other = segment.Authentic(RunFolder(Path("b")), (made_by(definition),), record(3, 4))
        monkeypatch.setattr(segment, "authentic", lambda *words, other=other: other)
        with pytest.raises(error, match=told):
            command._parted(known, policies.Policy(()), asked)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nowhere"], "no such folder: nowhere"),
        (["run/checkpoints/step-00000004"], "name the run folder"),
        (["run", "--processes", "0"], "--processes 0 is no number of ranks"),
        (["run", "--random", "0"], "--random 0 draws no segment"),
        (["run", "--folder", "nowhere"], "no such folder: --folder nowhere"),
    ],
)
def test_a_wrong_call_is_refused_before_anything_is_read(
    words: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Oracle: exit code 2 and the word that is wrong."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "checkpoints" / "step-00000004").mkdir(parents=True)
    run_folder.identity(tmp_path / "me")
    code = cli.main(["replay", *words, "--from", "0", "--to", "4", "--key", "me.ed25519.pub"])
    assert (code, told in capsys.readouterr().err) == (2, True)


def test_equal_records_have_no_first_difference_and_the_shorter_one_ends_it() -> None:
    """Oracle: none in the steps that both have."""
    assert divergence.between(record(1000, 1001), record(900, 950))[0] is None
    assert divergence.between(record(10, 11), {})[0] is None


@pytest.mark.slow
def test_the_segment_in_which_two_runs_part_is_executed_again(place: Place) -> None:
    """Oracle: the micro-batch from which the fault was planted, 15 of two a step: step 8, between the
    checkpoints of steps 4 and 8."""
    (place.root / "planted.py").write_text(PLANTED)
    task = '{kind: "planted:Planted", options: {plain: true}}'
    for name, environ in (("honest", {}), ("run", {"PLANTED": "15"})):
        text = toy_task.config(place.root / name, **SECTIONS, task=task, evaluate="{every: 0}")
        place.write(f"{name}.yaml", text)
        assert place.harness("train", f"{name}.yaml", environ=environ).code == 0
    done, (segment,) = replay(place, "--against", str(place.root / "honest"))
    assert done.code == 1, done.err
    assert '"against": {' in done.out
    assert segment["steps"] == {"from": 4, "to": 8}
    assert (segment["verdict"], segment["first_divergence"]["step"]) == ("outside", 8)
    alone, _ = replay(place, "--against", str(place.run))
    assert (alone.code, "both records are equal in the 12 steps" in alone.err) == (2, True)
    both, _ = replay(place, "--against", str(place.run), "--from", "3")
    assert (both.code, "--against RUN stands alone" in both.err) == (2, True)


@pytest.mark.parametrize(
    ("named", "folder"),
    [("~/proj/a.yaml", "HOME/proj"), ("configs/a.yaml", "configs"), ("/lab/a.yaml", "/lab")],
)
def test_the_folder_of_the_config_is_the_one_that_the_signed_command_names(
    named: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: statements write the home folder as `~`, which no file system knows."""
    monkeypatch.setenv("HOME", str(tmp_path))
    facts = {"launch": {"command": ["python", "-m", "harness", "train", named, "train.steps=3"]}}
    assert reexecute.config_folder(facts) == Path(folder.replace("HOME", str(tmp_path)))
