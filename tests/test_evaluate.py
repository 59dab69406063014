"""`harness evaluate`: a verified checkpoint's measures, each example kept, signed as a test-result."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import toy_task
from conftest import Place
from safetensors.torch import load_file

from harness.audit import verify
from harness.provenance import later, policy
from harness.provenance.keys import load_public


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


def by_hand(place: Place) -> float:
    """The toy's accuracy on its first sample, which is all that it holds out one at a time."""
    toy = toy_task.Toy(seed=3, plain=True)
    model = toy.build_model()
    model.load_state_dict(load_file(place.run / "checkpoints" / "step-00000006" / "model.safetensors"))
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
    assert {item["accuracy"] for item in items} == {by_hand(trained)} == {document["metrics"]["accuracy"]}
    (bundle,) = (trained.run / "checkpoints" / "step-00000006" / "provenance").glob("test-result-*")
    assert later.name_of(f"provenance/{bundle.name}") == "test-result-0"
    keys = [load_public(path) for path in sorted((trained.root / "config" / "harness").glob("*.pub"))]
    report = verify.verify(trained.run, policy.from_keys(keys), quiet=True)
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
