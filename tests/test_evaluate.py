"""`harness evaluate`: a verified checkpoint's measures, each example kept, signed as a test-result."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import run_folder
import toy_task
from conftest import Place
from run_folder import Predicate
from safetensors.torch import load_file
from torch import Tensor

from harness import cli
from harness.audit.verification import verify
from harness.format.layout import RunFolder
from harness.provenance import later
from harness.provenance.policy import rules
from harness.provenance.signing.keys import load_public
from harness.sweeps import register


@pytest.fixture
def trained(place: Place) -> Place:
    """A toy run of six steps, without noise, and the words that trust its key."""
    sections = {"train": "{steps: 6, global_batch: 4, micro_batch: 2}", "checkpoint": "{every: 6}"}
    task = '{kind: "toy_task:Toy", options: {plain: true}}'
    place.write(
        "toy.yaml", toy_task.config(place.run, **{**sections, "task": task, "evaluate": "{batches: 8}"})
    )
    assert place.harness("train", "toy.yaml").code == 0
    return place


def words(place: Place, *more: str) -> list[str]:
    """The command, with the key that the run was signed with."""
    keys = sorted(str(path) for path in (place.root / "config" / "harness").glob("*.pub"))
    checkpoint = place.run / "checkpoints" / "step-00000006"
    return ["evaluate", str(checkpoint), "--examples", "16", *more, "--key", *keys]


def by_hand(checkpoint: Path, seed: int = 3) -> float:
    """The toy's accuracy on its first sample, which is all that it holds out one at a time."""
    toy = toy_task.Toy(seed=seed, plain=True)
    model = toy.build_model()
    model.load_state_dict(load_file(checkpoint / "model.safetensors"))
    (batch,) = toy.evaluation(1, 1)
    return toy.metrics(toy.evaluate(model, batch))["accuracy"]


@pytest.mark.slow
def test_an_evaluation_is_kept_example_by_example_and_signed(trained: Place) -> None:
    """Oracle: the weights as safetensors loads them, on the sample that the toy holds out; `hashlib`."""
    done = trained.harness(*words(trained, "--at-least", "accuracy=2", "--json"))
    assert done.code == 1, done.err
    document = json.loads(done.out)
    assert (document["result"], document["failed"]) == ("FAILED", ["accuracy at least 2"])
    data = Path(document["items"]).read_bytes()
    assert hashlib.sha256(data).hexdigest() == document["items_sha256"]
    items = [json.loads(line) for line in data.splitlines()]
    assert len(items) == 16
    assert (
        {item["accuracy"] for item in items}
        == {by_hand(trained.run / "checkpoints" / "step-00000006")}
        == {document["metrics"]["accuracy"]}
    )
    (bundle,) = (trained.run / "checkpoints" / "step-00000006" / "provenance").glob("test-result-*")
    assert later.name_of(f"provenance/{bundle.name}") == "test-result-0"
    keys = [load_public(path) for path in sorted((trained.root / "config" / "harness").glob("*.pub"))]
    report = verify.verify(trained.run, rules.from_keys(keys), quiet=True)
    assert report.exit_code == 0, report.findings
    assert any("test-result-0: FAILED" in note for note in report.notes)


@pytest.mark.slow
def test_a_task_or_a_measure_that_is_another_one_is_refused(trained: Place) -> None:
    """Oracle: one byte of the user's task; a measure that there is not; nothing is signed either time."""
    unknown = trained.harness(*words(trained, "--at-least", "acuracy=1"))
    assert unknown.code == 2
    assert "there is no measure acuracy" in unknown.last_line
    with (trained.root / "toy_task.py").open("a") as file:
        file.write("\n")
    changed = trained.harness(*words(trained))
    assert changed.code == 2
    assert "is not the one that the checkpoint was trained with" in changed.last_line
    assert not list((trained.run / "checkpoints" / "step-00000006" / "provenance").glob("test-result-*"))
    assert not (trained.run / "evaluations").exists()


WEIGHTS = [("0.weight", [16, 8]), ("0.bias", [16]), ("2.weight", [4, 16]), ("2.bias", [4])]
SOURCE = hashlib.sha256(Path(toy_task.__file__).read_bytes()).hexdigest()


def is_a_toy(_: int, facts: Predicate) -> None:
    """Make the sample run's statement one of the toy."""
    facts["data"]["corpus_sha256"], facts["code"]["task"]["sha256"] = "0" * 64, SOURCE


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Four planned members, of which the third never began, with checkpoints of steps 10 and 20."""
    signer = run_folder.identity(tmp_path / "me")
    folder = tmp_path / "sweep"
    for seed in (0, 1, 3):
        config = run_folder.CONFIG.replace("seed: 3", f"seed: {seed}").replace(
            '"toy_task:Toy"', '"toy_task:Toy", options: {plain: true}'
        )
        root = folder / f"seed-{seed}"
        made: dict[str, Any] = {"name": root.name, "seed": seed, "config": config, "tweak": is_a_toy}
        tensors = {**run_folder.TENSORS, "model.safetensors": WEIGHTS}
        run_folder.build(root, signer, steps=(10, 20), tensors=tensors, **made)
    plan = register.Plan("2026-11-27T06:00:00Z", (0, 1, 2, 3), ("",), 0, None)
    (folder / register.NAME).write_bytes(register.Register({"": ""}, (plan,)).dumps())
    return folder


def answers(folder: Path, *words: str) -> list[str]:
    """The words that evaluate the sweep."""
    keys = [str(folder.parent / f"me.{kind}.pub") for kind in ("ed25519", "p256")]
    signing = ["--signing-key", str(folder.parent / "me.key")]
    base = ["--folder", str(Path(__file__).parent)]
    return ["evaluate", str(folder), "--examples", "5", *base, *signing, *words, "--key", *keys]


def signed(folder: Path, step: int) -> list[str]:
    """Seeds and their test-results at ``step``."""
    name = RunFolder(Path()).checkpoint(step)
    return sorted(
        f"{path.parts[-5]} {path.name.partition('.')[0]}"
        for path in folder.glob(f"*/{name}/provenance/test-result-*")
    )


def test_a_sweep_is_evaluated_past_what_fails_and_goes_on_where_it_was_stopped(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: accuracies from weights that safetensors loads; the statements that lie in each member; one
    byte of seed 1, put back for the second time, when a member without a checkpoint alone is missing."""
    spoilt = sweep / "seed-1" / "checkpoints" / "step-00000020" / "model.safetensors"
    kept = spoilt.read_bytes()
    spoilt.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    assert cli.main(answers(sweep)) == 1
    shown = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in shown[:4]] == [f"{number} of 4" for number in range(1, 5)]
    assert shown[4] == "2 evaluated, 0 there already, 2 failed"
    assert ["seed-1: " in shown[5], "seed-2: the run has no complete" in shown[6], len(shown)] == [
        True,
        True,
        7,
    ]
    assert signed(sweep, 20) == ["seed-0 test-result-0", "seed-3 test-result-0"]
    spoilt.write_bytes(kept)
    assert cli.main([*answers(sweep), "--json"]) == 4
    told = json.loads(capsys.readouterr().out)
    assert [told["evaluated"], told["there"], told["failed"]] == [1, 2, 1]
    for member, seed in zip(told["members"], range(4), strict=True):
        if seed != 2:
            expected = by_hand(sweep / f"seed-{seed}" / "checkpoints" / "step-00000020", seed)
            assert member["evaluation"]["metrics"] == {"accuracy": expected}
    assert signed(sweep, 20) == [f"seed-{seed} test-result-0" for seed in (0, 1, 3)]
    assert signed(sweep, 10) == []


def test_the_step_that_is_asked_for_is_evaluated_and_code_that_raises_stops_no_other(
    sweep: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: a task that divides by zero the first time it is asked; the statements at step 10; a test that
    no member passes is signed, told again from the statement, and exit code 1 both times."""
    shutil.rmtree(sweep / "seed-3")
    right, calls = toy_task.Toy.metrics, []

    def metrics(toy: toy_task.Toy, sums: Tensor) -> dict[str, float]:
        calls.append(1)
        return {"accuracy": 1 / (len(calls) - 1)} if len(calls) == 1 else right(toy, sums)

    monkeypatch.setattr(toy_task.Toy, "metrics", metrics)
    assert cli.main(answers(sweep, "--step", "10", "--at-least", "accuracy=2")) == 1
    shown = capsys.readouterr()
    assert "ZeroDivisionError: division by zero" in shown.out
    assert "Traceback" in shown.err
    assert signed(sweep, 10) == ["seed-1 test-result-0"]
    assert cli.main([*answers(sweep, "--step", "10", "--at-least", "accuracy=2"), "--json"]) == 1
    failures = [each["failure"] for each in json.loads(capsys.readouterr().out)["members"]]
    assert failures[:2] == ["accuracy at least 2"] * 2
    assert all("no complete checkpoint of step 10" in each for each in failures[2:])
    assert signed(sweep, 20) == []


def test_a_run_is_its_newest_checkpoint_and_what_cannot_be_meant_is_refused(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the statement's place; the error tree; nothing is signed where the command makes no sense."""
    run, checkpoint = sweep / "seed-3", sweep / "seed-1" / "checkpoints" / "step-00000010"
    words = answers(sweep)
    for wrong, said in (
        ([*words, "--items", str(sweep / "items")], "--items names one file"),
        ([words[0], str(run), str(checkpoint), *words[2:], "--step", "10"], "--step chooses a checkpoint"),
        (words[: words.index("--key")], "whom to trust is not said"),
    ):
        assert cli.main(wrong) == 2
        assert said in capsys.readouterr().err
    assert signed(sweep, 10) == signed(sweep, 20) == []
    assert cli.main([words[0], str(run), *words[2:]]) == 0
    assert signed(sweep, 20) == ["seed-3 test-result-0"]
