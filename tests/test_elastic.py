"""Elastic runs: the same bits at any world size, through resumes, and in a replay on fewer ranks."""

from __future__ import annotations

import shutil
from pathlib import Path

import orjson
import pytest
from conftest import TESTS, Place
from test_train import keys, predicate
from toy_task import config

from harness.format import layout

pytestmark = pytest.mark.slow

SHARDED = '{kind: "toy_task:Toy", options: {sharded: true}}'
ELASTIC = {
    "task": SHARDED,
    "train": "{steps: 24, global_batch: 16, micro_batch: 2}",
    "determinism": "{elastic: true, shards: 8}",
    "optimizer": "{clip: 0.5}",
}


def write(place: Place, name: str, run: Path, **extra: str) -> str:
    """A config of an elastic run with dropout, noise and clipping in ``run``."""
    place.write(name, config(run, **{**ELASTIC, **extra}))
    return name


def chain(run: Path) -> list[tuple[object, ...]]:
    """Loss, norm, digests of samples, generators, gradients and state, and the chain, of every step."""
    wanted = ("step", "loss", "grad_norm", "batch", "rng", "gradients", "state", "chain")
    lines = [orjson.loads(line) for line in (run / "metrics.jsonl").read_bytes().splitlines()]
    return [tuple(line.get(name) for name in wanted) for line in lines]


def tensors(run: Path) -> list[list[tuple[object, ...]]]:
    """Name, shape and digest of every tensor of every checkpoint, those of the generators included."""
    found = []
    for folder in sorted((run / "checkpoints").iterdir()):
        listed = orjson.loads((folder / layout.MANIFEST).read_bytes())["tensors"]
        found.append(sorted((each["name"], *each["shape"], each["digest"]) for each in listed))
    return found


def test_every_world_size_and_every_change_of_it_makes_the_same_run(place: Place) -> None:
    """Oracle: the run of one process: every digest of every step, every tensor of every checkpoint,
    generators included; of the run that changed its ranks, the signed classes, and a replay of its end."""
    for run, ranks, parallel in (("run1", 1, "ddp"), ("run4", 4, "ddp"), ("rows4", 4, "fsdp2")):
        name = write(place, f"{run}.yaml", place.root / run, parallel=parallel)
        assert (done := place.harness("train", name, processes=ranks)).code == 0, done.err
        assert "8 shards added in a fixed tree: the same bits on 1, 2, 4, 8 ranks" in done.out
    text = write(place, "toy.yaml", place.run)
    for ranks, until in ((4, 6), (1, 12)):
        place.start_and_kill(f"checkpoints/step-{until:08d}", ["train", text], ranks)
    assert (done := place.harness("train", text, "parallel=fsdp2", processes=2)).code == 0, done.err
    assert "exact: same stack at any world size" in done.out

    one = chain(place.root / "run1")
    assert len(one) == 24
    assert all(None not in line[:6] for line in one)
    held = tensors(place.root / "run1")
    assert len(held) == 4
    assert "torch.cpu" in {name for name, *_ in held[-1]}
    for run in (place.root / "run4", place.root / "rows4", place.run):
        assert chain(run) == one
        assert tensors(run) == held

    rehearsals = set()
    for step, ranks in ((12, 1), (18, 2), (24, 2)):
        facts = predicate(place.run / "checkpoints" / layout.checkpoint_name(step))
        assert facts["segment"]["class"] == "exact"  # type: ignore[index]
        assert facts["launch"]["world_size"] == ranks  # type: ignore[index]
        assert facts["determinism"]["settings"]["elastic_shards"] == 8  # type: ignore[index]
        rehearsals.add(facts["determinism"]["settings"]["elastic_rehearsal"])  # type: ignore[index]
    for run in ("run1", "run4", "rows4"):
        facts = predicate(place.root / run / "checkpoints" / layout.checkpoint_name(24))
        rehearsals.add(facts["determinism"]["settings"]["elastic_rehearsal"])  # type: ignore[index]
    assert len(rehearsals) == 1
    whom = keys(place)
    words = ["replay", str(place.run), "--from", "18", "--to", "24", "--processes", "1", *whom]
    assert (done := place.harness(*words)).code == 0, done.out + done.err
    shown = place.harness("verify", str(place.run), *whom)
    assert shown.code == 0, shown.out + shown.err
    assert "tier 1b: the same bits with another number of processes" in shown.out
    assert "seen with 1, 2 processes" in shown.out


@pytest.mark.parametrize(
    ("extra", "processes", "says"),
    [
        ({"task": '{kind: "toy_task:Toy"}'}, 1, "generators of its own (noise, numpy, python)"),
        ({"train": "{steps: 4, global_batch: 12, micro_batch: 2}", "determinism": "{elastic: true}"}, 1,
         "determinism.elastic needs a power of two of micro-batches"),
        ({"determinism": "{elastic: true, shards: 4}"}, 1, "determinism.shards is 4, and train.global_batch"),
        ({"determinism": "{shards: 8}"}, 1, "determinism.shards says nothing without determinism.elastic"),
        ({"task": '{kind: "toy_task:Toy", options: {sharded: true, own_process: true}}'}, 2,
         "rank 1 gets other gradients than rank 0"),
        ({"task": '{kind: "toy_task:Toy", options: {sharded: true, own_process: true}}', "parallel": "fsdp2"},
         2,
         "rank 1 gets other gradients than rank 0, in 2 of 2 units of FSDP2"),
        ({"task": '{kind: "toy_task:Toy", options: {sharded: true, skipping: true}}', "parallel": "fsdp2"},
         2,
         "rank 0 comes to `2` on the way forward, rank 1 to `3` on the way forward"),
        ({}, 3, "16 is not a multiple of train.micro_batch 2 x 3 processes"),
    ],
)  # fmt: skip
def test_what_would_break_it_is_refused_with_the_reason(
    place: Place, extra: dict[str, str], processes: int, says: str
) -> None:
    """Oracle: the conditions under which the tree is the same for all; nothing is trained."""
    done = place.harness("train", write(place, "toy.yaml", place.run, **extra), processes=processes)
    assert done.code != 0
    assert says in done.err, done.err[-2000:]
    assert not list(place.run.glob("checkpoints/*"))


def test_a_task_that_finds_its_world_size_where_nobody_looks_is_refused_at_another_one(place: Place) -> None:
    """Oracle: a divisor that C's getenv tells, 2 on two ranks, 1 on one; two may go on after it."""
    shutil.copy(TESTS / "hostile_tasks.py", place.root)
    task = '{kind: "hostile_tasks:Unseen"}'
    name = write(
        place, "toy.yaml", place.run, task=task, train="{steps: 2, global_batch: 16, micro_batch: 2}"
    )
    assert (done := place.harness("train", name, processes=2)).code == 0, done.err
    refused = place.harness("train", name)
    assert (refused.code, refused.out) != (0, "")
    assert "gets other gradients than the one before it, which had 2 processes and this one 1" in refused.err
    assert place.harness("train", name, processes=2).code == 0
