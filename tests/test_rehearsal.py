"""What would break the bits of an elastic run is refused before its first step, by one line that names it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from toy_task import Toy, config

from harness import config as configs
from harness.checkpoint import rng
from harness.commands import plan as command
from harness.determinism import peers
from harness.determinism.peers import Peers
from harness.errors import ResumeRefused, TrainingFailed
from harness.format import layout
from harness.provenance.signing import keys
from harness.training.beginning import continuation
from harness.training.beginning.continuation import Launched
from harness.training.elastic import rehearsal, tree_sums
from harness.training.evaluation.held_out import evaluate
from harness.training.loop import train
from harness.training.plan import plan
from harness.training.seeding import seed_rank
from harness.training.statement.record import RunFacts, Segment, in_words
from harness.training.step import position
from harness.workers import Workers

ALONE = Workers.alone(torch.device("cpu"))


def run(root: Path, kind: str, **sections: str) -> Path:
    """An elastic run of two steps in this process."""
    keys.create(root / "me")
    sections = {
        "train": "{steps: 2, global_batch: 8, micro_batch: 2}",
        "determinism": "{elastic: true}",
        "evaluate": "{every: 1, batches: 2}",
        "signing": f"{{key: {root}/me.key}}",
        **sections,
    }
    task = f'{{kind: "hostile_tasks:{kind}"}}'
    (root / "toy.yaml").write_text(config(root / "run", task=task, **sections))
    train(configs.load(root / "toy.yaml"), quiet=True)
    return root / "run"


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("Counts", "`Counts.made` is not the same after the same micro-batch"),
        ("CountsGlobally", "`hostile_tasks.passes` is not the same after the same micro-batch"),
        ("CountsInClass", "`CountsInClass.ever` is not the same after the same micro-batch"),
        ("Judges", "`Judges.seen` is not the same after the same micro-batch"),
        ("Teacher", "the parameter `teacher.weight` is written to in a micro-batch"),
        ("Loose", "`LooseNet.mean` is not the same after the same micro-batch"),
        ("Average", "`AverageNet.average` is not the same after the same micro-batch"),
        ("Normal", "the buffer `normal.running_mean` changes in training"),
        (
            "Draws",
            "shard 0 gets other gradients when computed again, in 4 of 4 tensors, first `first.weight`",
        ),
        ("Clock", "shard 0 gets other gradients when computed again"),
        ("Augments", "shard 0 gets other gradients when computed again"),
        ("MadeByWorld", "asks for its rank or world size when it is made: $WORLD_SIZE at hostile_tasks.py:"),
        (
            "World",
            "asks for its rank or world size when it builds its model: $WORLD_SIZE at hostile_tasks.py:",
        ),
        (
            "Asks",
            "asks for its rank or world size when it computes a micro-batch: `is_initialized` at hostile",
        ),
        ("Sparse", "`table` has sparse gradients"),
        ("Synced", "`normal` is a SyncBatchNorm, whose statistics are of what all ranks compute at a time"),
        ("Strided", "the parameter `first.weight` of shape (16, 8) is not contiguous in memory"),
        ("Lazy", "the parameter `first.weight` has no shape yet"),
        ("Writes", "`unit` writes to the input of a unit in place"),
        ("Unused", "`unused.weight` gets no gradient from a micro-batch"),
        ("Backward", "`first.weight` has a gradient before the loss is returned"),
        ("Row", "the loss has shape (1,), and must be a scalar"),
    ],
)
def test_what_carries_over_between_shards_or_asks_for_its_rank_is_refused(
    tmp_path: Path, kind: str, says: str
) -> None:
    """Oracle: the planted fault, in one line, on one rank already; nothing is trained."""
    with pytest.raises(TrainingFailed) as raised:
        run(tmp_path, kind)
    assert says in str(raised.value)
    assert raised.value.where == "determinism.elastic"
    assert raised.value.remedy
    assert not layout.RunFolder(tmp_path / "run").checkpoint(2).exists()


def test_caches_and_what_is_overwritten_are_no_faults_and_fixed_statistics_stay_fixed(tmp_path: Path) -> None:
    """Oracle: a run to its end, through an evaluation after each step; BatchNorm counts the batches that it
    takes statistics of."""
    folder = run(tmp_path, "Honest")
    saved = load_file(layout.RunFolder(folder).checkpoint(2) / "model.safetensors")
    assert int(saved["normal.num_batches_tracked"]) == 0


def test_a_launch_that_gets_other_gradients_than_the_one_before_is_exact_no_more() -> None:
    """Oracle: the digest that the statement before has, none where an older version made it, or another."""
    said: list[str] = []

    def compared(signed: dict[str, str], accept: Sequence[str] = ()) -> tuple[str, str, int]:
        before = {"determinism": {"settings": signed}, "launch": {"world_size": 2}}
        opened: Any = SimpleNamespace(found=SimpleNamespace(statement=SimpleNamespace(predicate=before)))
        segment = Segment(1, "exact")
        facts = RunFacts({}, segment, {"world_size": 4}, {}, {}, {}, {}, "warn", {"threads": 1})
        found = continuation.rehearsed(opened, Launched(segment, facts), "b" * 64, accept, said.append)
        assert found.facts.segment == found.segment
        settings = found.facts.determinism_settings
        assert settings == {"threads": 1, "elastic_rehearsal": "b" * 64}
        return found.segment.kind, in_words(found.segment.differences), len(said)

    assert compared({}) == compared({"elastic_rehearsal": "b" * 64}) == ("exact", "", 0)
    with pytest.raises(ResumeRefused, match="than the one before it, which had 2 processes and this one 4"):
        compared({"elastic_rehearsal": "a" * 64}, ["config"])
    told = "gradients of shards 0 and 1: aaaaaaaaaaaa… → bbbbbbbbbbbb…"
    assert compared({"elastic_rehearsal": "a" * 64}, ["code"]) == ("accepted", told, 1)


def test_loader_processes_that_make_other_samples_are_refused(tmp_path: Path) -> None:
    """Oracle: the second of two processes adds its number to its samples."""
    with pytest.raises(TrainingFailed, match="a loader process makes other micro-batches of update 1 than"):
        run(tmp_path, "Loader", train="{steps: 2, global_batch: 8, micro_batch: 2, data_workers: 2}")


class OtherRank(Workers):
    """One of two ranks, whose peer tells the same but for the last byte."""

    def gather_bytes(self, data: bytes) -> list[bytes]:
        return [data, data[:-1] + bytes([data[-1] ^ 1])] if data else [data, data]


def test_ranks_that_begin_with_other_weights_are_told_apart_before_fsdp2_mixes_them() -> None:
    """Oracle: the last tensor of the model, whose sum comes last."""
    task: Any = SimpleNamespace(build_model=lambda: nn.Linear(2, 3))
    with pytest.raises(TrainingFailed, match="rank 1 builds another model than rank 0: `bias` differs"):
        rehearsal.build_model(task, OtherRank(0, 2, torch.device("cpu"), "none", None, 1))
    assert rehearsal.build_model(task, ALONE).weight.shape == (3, 2)


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_collectives_are_seen_whoever_begins_them_and_those_of_fsdp2_are_none(group: None) -> None:
    """Oracle: this file's own calls, of torch.distributed and of its functional collectives; a model cut by
    FSDP2 gathers in every pass."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    fully_shard(model)
    with Peers() as seen:
        model(torch.ones(2, 4)).sum().backward()
    assert (seen.sent(), seen.asked([__file__])) == ([], [])
    with Peers() as seen:
        dist.all_reduce(torch.ones(1))
        torch.distributed._functional_collectives.all_reduce(torch.ones(1), "sum", dist.group.WORLD).wait()
        tree_sums.all_gather(torch.ones(1), torch.ones(1))
        dist.get_world_size()
    names = ["all_reduce", "all_reduce", tree_sums.all_gather.__name__]
    assert [each.split(":")[0] for each in seen.sent()] == [
        f"`{name}` at test_rehearsal.py" for name in names
    ]
    assert [each.split(":")[0] for each in seen.asked()] == ["`get_world_size` at test_rehearsal.py"]


def test_other_ways_to_ask_are_seen_as_well(group: None) -> None:
    """Oracle: this file's own questions, one a line; the size of a tensor is none."""
    part = DTensor.from_local(torch.ones(2), dist.device_mesh.init_device_mesh("cpu", (1,)))
    asks: list[tuple[Callable[[], object], list[str]]] = [
        (lambda: dist.group.WORLD.size(), ["`size` of a process group"]),  # type: ignore[union-attr]
        (lambda: dist.group.WORLD.rank(), ["`rank` of a process group"]),  # type: ignore[union-attr]
        (lambda: part.device_mesh.get_local_rank(), ["`device_mesh`", "`get_local_rank`"]),
        (lambda: part.device_mesh.size(), ["`device_mesh`", "`size`"]),
        (lambda: part.to_local(), ["`to_local`"]),
        (lambda: PartialState().num_processes, ["accelerate's state"]),
        (lambda: os.environb.get(b"RANK"), ["$RANK"]),
        (lambda: torch.ones(2).size(), []),
    ]
    for ask, wanted in asks:
        with Peers() as seen:
            ask()
        assert [each.split(" at ")[0] for each in seen.asked([__file__])] == wanted


class DrawsWhenEvaluated(Toy):
    """Its measure is what it drew."""

    def evaluate(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return torch.rand(1, dtype=torch.float64)

    def metrics(self, sums: torch.Tensor) -> dict[str, float]:
        return {"accuracy": float(sums[0])}


def test_what_an_evaluation_draws_does_not_depend_on_step_or_rank() -> None:
    """Oracle: both batches on one rank, one on each of two, and after other numbers were drawn."""
    task = DrawsWhenEvaluated(seed=1, sharded=True)
    model, batches = task.build_model(), task.evaluation(2, 2)

    def measured(workers: Workers) -> float:
        seed_rank(workers.rank, 7)
        before = rng.capture({})
        found = evaluate(task, model, batches, workers, torch.no_grad())["accuracy"]
        assert all(torch.equal(each, rng.capture({})[name]) for name, each in before.items())
        return found

    alone = measured(ALONE)
    assert (
        measured(replace(ALONE, rank=0, world_size=2)) + measured(replace(ALONE, rank=1, world_size=2))
        == alone
    )
    assert alone == measured(ALONE) != 0


def test_the_price_that_was_measured_is_planned_where_it_was_measured() -> None:
    """Oracle: the rows of scripts/bench/README.md, which are of DDP on several ranks."""
    loaded = configs.load(Path("configs/tiny.yaml"), ["determinism.elastic=true"])

    def said(ranks: int, **changes: Any) -> bool:
        settings = loaded.settings.model_copy(update=changes)
        planned = plan(settings, Path("configs"), ranks)
        return "over gloo: 2.0 to 2.7 times" in dict(command._rows(planned, settings))["elastic"]

    assert (said(1), said(2), said(2, parallel="fsdp2")) == (False, True, False)


def test_ranks_after_an_elastic_run_get_generators_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the manifest, which names the generators of rank 0 alone, or of both, one of them not there."""
    monkeypatch.setattr(position.state, "load", lambda *_: None)
    monkeypatch.setattr(position.state, "group_names", lambda _: [])
    current: Any = SimpleNamespace(
        state=None, sums=None, seed=3, updates=0, workers=replace(ALONE, rank=1, world_size=2),
        batches=SimpleNamespace(iterate=lambda step: iter([step]), workers=0),
    )  # fmt: skip
    trainer = {"world_size": 2, "groups": [], "aliases": {}, "step": 5}
    names = [f"rng-rank-{rank:05d}.safetensors" for rank in range(2)]
    loaded: Any = SimpleNamespace(
        trainer=trainer, files={}, manifest=SimpleNamespace(digests=dict.fromkeys(names[:1], ""))
    )
    assert next(position.resume(current, loaded)) == 5
    drawn = torch.rand(1)
    seed_rank(3, 1, 5)
    assert torch.equal(drawn, torch.rand(1))
    loaded.manifest.digests[names[1]] = ""
    with pytest.raises(TrainingFailed, match="no generators for rank 1"):
        position.resume(current, loaded)


def test_packages_of_another_python_are_nobodys_own_code() -> None:
    """Oracle: where Debian, a base environment below a virtual one, and a source build keep them."""
    assert not peers.is_own("/usr/lib/python3/dist-packages/library/module.py")
    assert not peers.is_own("/opt/conda/lib/python3.12/site-packages/library/module.py")
    assert not peers.is_own(torch.distributed.__file__ or "")
    assert peers.is_own("/home/me/project/own_task.py")
    assert peers.is_own("/opt/lib/site-packages/own/task.py", ["/opt/lib/site-packages/own"])
