"""Checkpoints that several ranks write and read: other world sizes, other ways of sharding, damage."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import orjson
import pytest
from conftest import TESTS, Place, finish, launched
from safetensors.torch import load_file
from test_train import keys, predicate
from toy_task import config

from harness.format import layout

pytestmark = pytest.mark.slow

PLAIN = '{kind: "toy_task:Toy", options: {plain: true, pause: 15}}'
SPLIT = "{every: 6, file_bytes: 600}"


def lines(run: Path) -> list[dict[str, object]]:
    """The objects of metrics.jsonl."""
    return [orjson.loads(line) for line in (run / "metrics.jsonl").read_bytes().splitlines()]


@pytest.mark.parametrize("ranks", [2, 3])
def test_whole_tensors_travel_to_one_rank_and_back(place: Place, ranks: int) -> None:
    """Oracle: `DTensor.full_tensor`, for rows that do and do not divide by the ranks."""
    command = [sys.executable, f"{TESTS}/ranks.py", str(ranks), sys.executable, f"{TESTS}/mesh_check.py"]
    done = finish(launched(command, place.root, place.environ, fork=True))
    assert done.code == 0, done.err[-3000:]


LAUNCHES = [(2, "ddp", 6), (3, "fsdp2", 12), (1, "ddp", 18)]
"""Processes, way of sharding, and the checkpoint at which the launch is killed; the last one ends."""
TRAIN = "{steps: 18, global_batch: 12, micro_batch: 2}"


@pytest.fixture(scope="module")
def changing(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A run whose launches differ in world size and sharding."""
    place = Place(tmp_path_factory.mktemp("changing"))
    place.write("toy.yaml", config(place.run, task=PLAIN, checkpoint=SPLIT, train=TRAIN))
    for processes, parallel, until in LAUNCHES:
        words = ["train", "toy.yaml", f"parallel={parallel}"]
        if until == 18:
            done = place.harness(*words, processes=processes)
            assert done.code == 0, done.err
            assert "same-data: the same samples in the same order" in done.out
        else:
            place.start_and_kill(f"checkpoints/step-{until:08d}", words, processes)
    return place


def test_a_run_goes_on_at_any_world_size_and_under_any_sharding(changing: Place) -> None:
    """Oracle: the uninterrupted run of one process: the same samples at every step, losses within rounding;
    the signed class says what changed."""
    twin = changing.root / "twin"
    changing.write("twin.yaml", config(twin, task=PLAIN, checkpoint=SPLIT, train=TRAIN))
    assert changing.harness("train", "twin.yaml").code == 0
    ours, theirs = lines(changing.run), lines(twin)
    assert [line["step"] for line in ours] == list(range(1, 19))
    assert [line["batch"] for line in ours] == [line["batch"] for line in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    segments = [predicate(changing.run / "checkpoints" / layout.checkpoint_name(step)) for step in (12, 18)]
    for facts, (processes, parallel, _) in zip(segments, LAUNCHES[1:], strict=True):
        changed = {item["what"] for item in facts["segment"]["differences"]}  # type: ignore[index]
        assert facts["segment"]["class"] == "same-data"  # type: ignore[index]
        assert {"launch.world_size", "parallel"} <= changed
        assert facts["launch"]["world_size"] == processes  # type: ignore[index]
        assert facts["launch"]["parallel"] == parallel  # type: ignore[index]
    assert changing.harness("verify", str(changing.run), *keys(changing)).code == 0


@pytest.mark.parametrize(("parallel", "step"), [("ddp", 6), ("fsdp2", 12)])
def test_split_weights_are_a_hugging_face_folder(changing: Place, parallel: str, step: int) -> None:
    """Oracle: the index as `transformers` reads it, and the safetensors package; every rank wrote a file."""
    folder = changing.run / "checkpoints" / layout.checkpoint_name(step)
    assert predicate(folder)["launch"]["parallel"] == parallel  # type: ignore[index]
    index = json.loads((folder / "model.safetensors.index.json").read_bytes())
    files = {name: load_file(folder / name) for name in set(index["weight_map"].values())}
    assert len(files) > 1
    shapes = {name: tuple(files[file][name].shape) for name, file in index["weight_map"].items()}
    assert shapes == {"0.weight": (16, 8), "0.bias": (16,), "2.weight": (4, 16), "2.bias": (4,)}
    held = {name for tensors in files.values() for name in tensors}
    assert held == set(index["weight_map"])
    total = sum(tensor.numel() * 4 for tensors in files.values() for tensor in tensors.values())
    assert index["metadata"]["total_size"] == total


def test_a_damaged_tensor_sends_every_rank_back_to_the_checkpoint_before(place: Place) -> None:
    """Oracle: what is said, and the damaged bytes set aside; found while tensors are read into the model."""
    place.write("toy.yaml", config(place.run, task=PLAIN, checkpoint=SPLIT))
    place.start_and_kill("checkpoints/step-00000012", ["train", "toy.yaml"], 2)
    newest = sorted((place.run / "checkpoints").glob("step-*"))[-1]
    victim = sorted(newest.glob("optimizer-*"))[-1]
    data = bytearray(victim.read_bytes())
    data[-3] ^= 1
    victim.write_bytes(bytes(data))
    again = place.harness("train", "toy.yaml", processes=2)
    assert again.code == 0, again.err
    assert f"{newest.name} is damaged: tensor `optimizer." in again.out
    assert "going back to the one before" in again.out
    assert "exact: same stack and world size" in again.out
    assert bytes(data) in [
        path.read_bytes() for path in place.run.glob(f"checkpoints/damaged-*/{victim.name}")
    ]
    verified = place.harness("verify", str(place.run), *keys(place))
    assert "signed up to step 24" in verified.out


def test_a_failed_save_need_not_stop_the_run_but_the_last_one_must_work(place: Place) -> None:
    """Oracle: the later checkpoints, the failure on the screen and in events/, and in the end exit code 3."""
    extra = {"checkpoint": "{every: 6, on_failure: continue}", "task": PLAIN}
    place.write("toy.yaml", config(place.run, **extra))
    place.hold("metrics.jsonl")
    process = place.start(["train", "toy.yaml"])
    place.wait_for(process, "metrics.jsonl")
    (place.run / "checkpoints").mkdir(exist_ok=True)
    for step in (12, 24):
        (place.run / "checkpoints" / f".tmp-step-000000{step}").write_text("in the way")
    place.go_on()
    done = finish(process)
    out, err = done.out, done.err
    assert done.code == 3, err
    assert "a save has failed: writing a checkpoint failed: File exists" in out
    assert "goes on, as checkpoint.on_failure says" in out
    assert "File exists" in err
    assert "complete:" not in out
    names = {path.name for path in (place.run / "checkpoints").glob("step-*")}
    assert names == {"step-00000006", "step-00000018"}
    events = (place.run / "events" / "rank-00000.jsonl").read_text()
    assert '"event":"failure"' in events
    assert place.harness("verify", str(place.run), *keys(place)).code == 0
