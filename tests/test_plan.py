"""`harness plan`, against the models and checkpoints that it foretells."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Place

from harness import config
from harness.cli import main
from harness.errors import ConfigError
from harness.model.gpt import GPT
from harness.tasks.build import build
from harness.tasks.language import shape_of
from harness.training.plan import Plan, plan

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
ROOT = CONFIGS[0].parent


def planned(name: str, world_size: int = 1, *overrides: str) -> Plan:
    """The plan of a shipped config."""
    loaded = config.load(ROOT / name, list(overrides))
    return plan(loaded.settings, loaded.path.parent, world_size)


@pytest.mark.parametrize("name", ["tiny.yaml", "digits.yaml"])
def test_parameters_are_those_of_the_model(name: str) -> None:
    """Oracle: the model, really built."""
    loaded = config.load(ROOT / name)
    model = build(loaded.settings, loaded.path.parent).build_model()
    assert planned(name).parameters == sum(each.numel() for each in model.parameters())


@pytest.mark.parametrize("name", ["tiny.yaml", "gpt-124m.yaml"])
def test_parameters_of_a_decoder_are_known_without_its_corpus(name: str) -> None:
    """Oracle: the decoder on torch's meta device, with the vocabulary written in the config."""
    made = config.load(ROOT / name).settings
    assert made.model is not None
    assert made.data is not None
    assert made.tokenizer is not None
    vocabulary = 257 if made.tokenizer.kind == "bytes" else made.tokenizer.vocabulary
    with torch.device("meta"):
        model = GPT(shape_of(made.model, made.data.sequence_length, vocabulary))
    assert planned(name).parameters == sum(each.numel() for each in model.parameters())


def test_time_is_told_only_where_the_speed_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: none without a speed; tokens over tokens per second; an unknown GPU is an error."""
    words = ["plan", str(ROOT / "tiny.yaml")]
    assert main([*words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["seconds"] is None
    assert (document["global_batch"], document["units"]) == (8, 60 * 8 * 64)
    assert main([*words, "--tokens-per-second", "1024", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["seconds"] == 60 * 8 * 64 / 1024
    assert main([*words, "--gpu", "Abacus"]) == 2
    assert "'Abacus' in fp32 is not known" in capsys.readouterr().err
    assert main([*words, "--gpu", "H100", "precision=bf16", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["seconds"] == pytest.approx(document["flops"] / (0.4 * 989.4e12))


@pytest.mark.parametrize("words", [["--world-size", "0"], ["--tokens-per-second", "0"]])
def test_nothing_can_run_on_no_process_or_at_no_speed(
    capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    """Oracle: exit code 2."""
    assert main(["plan", str(ROOT / "tiny.yaml"), *words]) == 2
    assert "greater than 0" in capsys.readouterr().err


def test_gpt_124m_has_the_size_of_its_name() -> None:
    """Oracle: the name; 12 layers of width 768."""
    assert 115e6 < planned("gpt-124m.yaml").parameters < 130e6


def test_memory_of_a_rank_follows_from_the_parameters() -> None:
    """Oracle: fp32 weights, gradients and two moments; an average costs one more copy."""
    small = planned("tiny.yaml")
    assert small.memory.gradients == 4 * small.parameters
    assert small.memory.optimizer == pytest.approx(8 * small.parameters, rel=0.01)
    assert small.memory.average == 0
    assert planned("tiny.yaml", 1, "optimizer.ema=0.9").memory.average == 4 * small.parameters
    bigger = planned("tiny.yaml", 1, "train.micro_batch=8").memory.activations
    assert small.memory.activations is not None
    assert bigger is not None
    assert 1.7 < bigger / small.memory.activations < 2.3


@pytest.mark.parametrize(
    ("ranks", "parallel", "lists", "sent", "times", "held"),
    [
        (1, "ddp", 4, 0.0, 0, 3.0),
        (4, "ddp", 2, 1.5, 1, 2.0),
        (8, "ddp", 1, 1.75, 1, 1.0),
        (4, "fsdp2", 2, 1.5, 2, 0.25),
        (8, "fsdp2", 1, 0.875, 1, 0.0),
    ],
)
def test_the_price_of_the_same_bits_follows_from_shards_and_ranks(
    ranks: int, parallel: str, lists: int, sent: float, times: int, held: float
) -> None:
    """Oracle: the formulas of docs/determinism.md for 8 shards, in units of all gradients."""
    words = [
        "determinism.elastic=true",
        "train.global_batch=8",
        "train.micro_batch=1",
        f"parallel={parallel}",
    ]
    made = planned("tiny.yaml", ranks, *words)
    gradients = 4 * made.parameters
    assert made.elastic is not None
    assert (made.elastic.shards, made.elastic.lists) == (8, lists)
    assert made.elastic.sent_bytes == pytest.approx(sent * gradients, abs=8)
    assert made.elastic.sent_bytes == made.elastic.plain_bytes * times
    assert made.memory.elastic == pytest.approx(held * gradients, abs=8)
    assert planned("tiny.yaml", ranks if ranks < 4 else 1).elastic is None


def test_the_ranks_divide_the_batch() -> None:
    """Oracle: global batch 8 and micro-batch 4 of tiny.yaml."""
    assert [planned("tiny.yaml", ranks).accumulation for ranks in (1, 2)] == [2, 1]
    with pytest.raises(ConfigError, match="not a multiple"):
        planned("tiny.yaml", 3)


def test_step_digests_over_the_budget_are_told_with_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: bytes counted by hand, of AdamW on fp32 weights: 4 a parameter of gradients at each step, 12 of
    state every 20; 6 FLOPs a parameter and token are about those of a decoder."""
    few = ["plan", "configs/gpt-124m.yaml", "train.global_batch=1", "train.micro_batch=1"]
    assert main([*few, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["digest_bytes"] == pytest.approx((4 + 12 / 20) * planned["parameters"], rel=0.01)
    share = 12 * planned["digest_bytes"] / planned["flops_per_step"]
    assert share == pytest.approx(12 * 4.6 / 6 / planned["units_per_step"], rel=0.3)
    budget = f"determinism.budget={share * 0.4:.6f}"
    told = []
    for words in (few, [*few, budget], [*few, budget, "determinism.step_digests=false"]):
        assert main(words) == 0
        told.append([row for row in capsys.readouterr().out.splitlines() if row.startswith("step digests")])
    assert (told[0], told[2]) == ([], [])
    assert "determinism.gradients_every and determinism.state_every 3 times as large" in told[1][0]


def test_what_is_kept_is_what_is_on_disk() -> None:
    """Oracle: three checkpoints of tiny.yaml; an old one goes after the new one is there."""
    every, two = planned("tiny.yaml"), planned("tiny.yaml", 1, "checkpoint.keep=1")
    assert (every.checkpoints, every.disk_bytes, every.store_bytes) == (3, 3 * every.checkpoint_bytes, 0)
    assert two.disk_bytes == 2 * two.checkpoint_bytes
    only = planned(
        "tiny.yaml", 1, "checkpoint.keep=1", "checkpoint.store=s3://bucket/run", "checkpoint.store_only=true"
    )
    assert (only.disk_bytes, only.store_bytes) == (only.checkpoint_bytes, 2 * only.checkpoint_bytes)
    assert replace(two, disk_bytes=every.disk_bytes) == every


@pytest.mark.slow
def test_a_real_checkpoint_has_the_bytes_that_were_planned(place: Place) -> None:
    """Oracle: the tensors of a checkpoint that training wrote; 3 % are left for headers and generators."""
    words = [f"run.dir={place.run}", "train.steps=1", "schedule.warmup=0"]
    done = place.harness("train", str(ROOT / "digits.yaml"), *words)
    assert done.code == 0, done.err
    folder = place.run / "checkpoints" / "step-00000001"
    size = sum(
        path.stat().st_size for path in folder.glob("*.safetensors") if not path.name.startswith("rng")
    )
    assert planned("digits.yaml").checkpoint_bytes == pytest.approx(size, rel=0.03)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_every_shipped_config_can_be_planned(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: exit code 0, and the same numbers as JSON; a corpus that is yet to be prepared is replaced."""
    data = config.load(file).settings.data
    instead = ["data.kind=wheel", "data.files=[]"] if data is not None and data.kind == "prepared" else []
    words = ["plan", str(file), "--world-size", "2", *instead]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert main([*words, "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert f"{document['parameters']:,}" in shown
    assert document["world_size"] == 2
