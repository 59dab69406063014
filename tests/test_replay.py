"""`harness replay`: an honest record is equal, one that was made otherwise is not, and nothing is guessed."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import toy_task
from conftest import TIMEOUT, Finished, Place, stop_rank
from hypothesis import given
from hypothesis import strategies as st

from harness.audit.replay import divergence

PLANTED = '''"""A toy whose loss an undeclared variable changes from one micro-batch on."""

import os

from toy_task import Toy


class Planted(Toy):
    losses = 0

    def loss(self, model, batch):
        self.losses += 1
        planted = os.environ.get("PLANTED")
        loss = super().loss(model, batch)
        return loss * 1.001 if planted and self.losses >= int(planted) else loss
'''
SECTIONS = {"train": "{steps: 12, global_batch: 4, micro_batch: 2}", "checkpoint": "{every: 4}"}


def replay(place: Place, *words: str) -> tuple[Finished, list[dict[str, Any]]]:
    """The command with the run's own key, and the segments that it told of."""
    keys = sorted(str(path) for path in (place.root / "config" / "harness").glob("*.pub"))
    done = place.harness("replay", str(place.run), *words, "--json", "--key", *keys)
    return done, json.loads(done.out).get("segments", [])


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A run of two ranks that was killed after step 4 and resumed, each of its steps 0.2 s long."""
    place = Place(tmp_path_factory.mktemp("resumed"))
    sections = {**SECTIONS, "train": "{steps: 12, global_batch: 4, micro_batch: 2, peer_timeout: 4}"}
    place.write(
        "toy.yaml",
        toy_task.config(place.run, **sections, task='{kind: "toy_task:Toy", options: {pause: 200}}'),
    )
    place.start_and_kill("checkpoints/step-00000004", ["train", "toy.yaml"], 2)
    assert place.harness("train", "toy.yaml", processes=2).code == 0
    return place


@pytest.mark.slow
def test_a_record_of_a_killed_and_resumed_run_is_equal_and_the_verdict_is_signed(resumed: Place) -> None:
    """Oracle: the run's own digests, on two ranks, across its resume; `harness verify` of the statement."""
    place = resumed
    done, (segment,) = replay(place, "--from", "4", "--to", "12")
    assert done.code == 0, done.err
    assert (segment["verdict"], segment["steps"]) == ("equal", {"from": 4, "to": 12})
    counts = {each["what"]: each["count"] for each in segment["compared"]}
    assert counts["gradients"] == 8
    assert counts["state"] == 2
    keys = sorted(str(path) for path in (place.root / "config" / "harness").glob("*.pub"))
    verified = place.harness("verify", str(place.run), "--key", *keys)
    assert verified.code == 0, verified.out
    assert "replay-0: equal, steps 4 to 12" in verified.out


@pytest.mark.slow
def test_a_replay_one_of_whose_ranks_hangs_ends_and_names_it(resumed: Place) -> None:
    """Oracle: the rank that this test has stopped; nothing is signed, and no rank is left behind."""
    place, scratch = resumed, resumed.root / "scratch"
    scratch.mkdir()
    before = sorted(place.run.rglob("replay-*"))
    keys = sorted(str(path) for path in (place.root / "config" / "harness").glob("*.pub"))
    words = ["replay", str(place.run), "--from", "4", "--to", "12", "--json", "--key", *keys]
    process = place.start(words, environ={"TMPDIR": str(scratch)})
    deadline = time.monotonic() + TIMEOUT
    while not any('"step"' in path.read_text() for path in scratch.glob("*/answer.jsonl")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    ranks = [each for each in psutil.Process(process.pid).children(recursive=True) if rank_of(each) >= 0]
    stopped, other = sorted(ranks, key=rank_of, reverse=True)
    done = stop_rank(stopped, other, process)
    assert done.code == 4, done.err
    assert "rank 1 gave no sign of life for 4 s" in done.err
    assert "start the replay again" in done.err
    assert sorted(place.run.rglob("replay-*")) == before
    assert psutil.wait_procs(ranks, timeout=TIMEOUT)[1] == []


def rank_of(process: psutil.Process) -> int:
    """Which rank of a replay ``process`` is; -1 for the launcher and anything else."""
    words = process.cmdline()
    if "harness.training.replay.execution" not in words or "torch.distributed.run" in words:
        return -1
    return int(process.environ()["RANK"])


@pytest.mark.slow
def test_a_run_that_an_undeclared_variable_changed_is_outside_at_its_first_step(place: Place) -> None:
    """Oracle: the micro-batch from which the fault was planted, 15 of two a step: step 8."""
    (place.root / "planted.py").write_text(PLANTED)
    task = '{kind: "planted:Planted", options: {plain: true}}'
    place.write("toy.yaml", toy_task.config(place.run, **SECTIONS, task=task, evaluate="{every: 0}"))
    assert place.harness("train", "toy.yaml", environ={"PLANTED": "15"}).code == 0
    done, (segment,) = replay(place, "--from", "0", "--to", "12")
    assert done.code == 1, done.err
    assert segment["verdict"] == "outside"
    assert segment["first_divergence"]["step"] == 8
    assert segment["suspects"] == []
    # A changed task is refused before anything is executed, and nothing is signed.
    with (place.root / "planted.py").open("a") as file:
        file.write("\n")
    refused, _ = replay(place, "--from", "0", "--to", "4")
    assert refused.code == 4
    assert "this is not what the statement says" in refused.err
    signed = list((place.run / "checkpoints").glob("*/provenance/replay-*"))
    assert len(signed) == 1


@pytest.mark.parametrize("words", [[], ["--from", "0"], ["--random", "1", "--to", "3"], ["--random", "0"]])
def test_steps_that_are_not_said_are_asked_for(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: exit code 2 or 4, never a segment that nobody chose; the folder holds no run."""
    from harness import cli
    from harness.provenance.signing import keys

    public = keys.create(tmp_path / "me").public
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    own = ["--signing-key", str(tmp_path / "me.key"), "--key", *map(str, public)]
    code = cli.main(["replay", str(tmp_path / "run"), *words, *own])
    assert code in (2, 4)
    assert capsys.readouterr().err.startswith("harness: ")


def test_a_run_to_compare_with_that_is_not_there_is_usage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: exit code 2, as for a run that is not there; 4 would say that its evidence is incomplete."""
    from harness import cli
    from harness.provenance.signing import keys

    public = keys.create(tmp_path / "me").public
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    words = ["replay", str(tmp_path / "run"), "--against", str(tmp_path / "nowhere")]
    assert cli.main([*words, "--key", *map(str, public)]) == 2
    assert f"no such folder: {tmp_path / 'nowhere'}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "what", "says"),
    [
        ("data", "data.corpus_sha256", "this is not what the statement says: data.corpus_sha256"),
        ("tokenizer", "data.tokenizer_sha256", "this is not what the statement says"),
        ("code", "code.git_commit", "this is not what the statement says: code.git_commit"),
        ("same-data", "stack.torch", "this stack is not the signed one: stack.torch: a → b"),
    ],
)
def test_a_place_that_is_not_the_signed_one_is_refused_by_name(kind: str, what: str, says: str) -> None:
    """Oracle: another stack alone may be accepted; exit code 4 and a remedy otherwise."""
    from harness.errors import EvidenceIncomplete
    from harness.training.replay import execution as training
    from harness.training.statement.record import Difference

    changes = [(kind, Difference(what, "a", "b"))]
    with pytest.raises(EvidenceIncomplete) as refused:
        training._refuse(changes, accepted=False)
    assert says in refused.value.what
    assert refused.value.remedy
    if kind == "same-data":
        training._refuse(changes, accepted=True)
    else:
        with pytest.raises(EvidenceIncomplete):
            training._refuse(changes, accepted=True)


@given(st.integers(1, 3000), st.data())
def test_the_first_difference_is_found_with_few_comparisons(count: int, data: st.DataObject) -> None:
    """Oracle: the place that was chosen; the logarithm."""
    place = data.draw(st.integers(0, count))
    found, queries = divergence.first_difference(count, lambda at: at < place)
    assert found == (None if place == count else place)
    assert queries <= math.log2(count) + 2
