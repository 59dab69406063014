"""Digests of gradients and state in metrics.jsonl, the chain and the statements.

That they do not depend on how a model is cut among ranks is in test_sharding (mesh_check.py).
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import orjson
import pytest
import torch
from conftest import Place
from test_train import keys, predicate
from toy_task import config

from harness.checkpoint.state import TrainingState
from harness.determinism.bit_sums import FORMAT
from harness.errors import EvidenceIncomplete
from harness.training.replay import execution
from harness.training.step.digests import StepDigests
from harness.workers import Workers

FEW = "{steps: 4, global_batch: 12, micro_batch: 2}"


def lines(run: Path) -> list[dict[str, object]]:
    return [orjson.loads(line) for line in (run / "metrics.jsonl").read_bytes().splitlines()]


@pytest.mark.slow
def test_digests_are_taken_signed_and_missed_when_they_change(place: Place) -> None:
    """Oracle: the chain that the checkpoint has signed."""
    place.write("toy.yaml", config(place.run, train=FEW, determinism="{state_every: 2}"))
    assert place.harness("train", "toy.yaml").code == 0
    path = place.run / "metrics.jsonl"
    good = path.read_bytes()
    assert place.harness("verify", "run", *keys(place)).code == 0
    taken = lines(place.run)
    assert len({line["gradients"] for line in taken}) == 4
    assert ["state" in line for line in taken] == [False, True, False, True]
    signed = predicate(place.run / "checkpoints" / "step-00000004")["metrics"]
    assert isinstance(signed, dict)
    assert (signed["gradients"], signed["state"]) == (taken[-1]["gradients"], taken[-1]["state"])
    digest = str(lines(place.run)[1]["gradients"]).encode()
    path.write_bytes(good.replace(digest, digest[::-1]))
    found = place.harness("verify", "run", *keys(place))
    assert (found.code, "step 2 was changed" in found.out) == (1, True)
    path.write_bytes(good.replace(b'"gradients":"' + digest + b'",', b""))
    assert place.harness("verify", "run", *keys(place)).code == 1


def state_after(change: str) -> bytes:
    """The digest of a small training state with one thing changed."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(200, 200), torch.nn.BatchNorm1d(200))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.ones(4, 200)).sum().backward()
    optimizer.step()
    averages = {"0.bias": copy.deepcopy(model[0].bias.detach())}
    with torch.no_grad():
        if change == "weight":
            model[0].weight[7, 7] = torch.nextafter(model[0].weight[7, 7], torch.tensor(9.0))
        if change == "buffer":
            model[1].running_mean[3] += 1e-3
        if change == "optimizer":
            optimizer.state[model[0].bias]["exp_avg"][0] += 1e-9
        if change == "count":
            optimizer.state[model[0].bias]["step"] += 1
        if change == "average":
            averages["0.bias"][2] *= 2
    state = TrainingState(model, optimizer, None, averages)
    return StepDigests(Workers.alone(torch.device("cpu")), state).state().digest()


def test_the_state_digest_covers_all_that_a_step_reads() -> None:
    """Oracle: each part, changed alone."""
    changes = ["", "weight", "buffer", "optimizer", "count", "average"]
    assert len({state_after(change) for change in changes}) == len(changes)
    assert state_after("") == state_after("")


def test_gradients_that_are_absent_are_not_gradients_of_zero() -> None:
    """Oracle: AdamW steps a parameter whose gradient is zero and leaves one alone that has none."""
    model = torch.nn.Linear(3, 2)
    state = TrainingState(model, torch.optim.AdamW(model.parameters()))
    digests = StepDigests(Workers.alone(torch.device("cpu")), state)
    model.weight.grad = torch.ones(2, 3)
    without = digests.gradients().digest()
    model.bias.grad = torch.zeros(2)
    assert digests.gradients().digest() != without


@pytest.mark.parametrize("signed", [{}, {"step_digests": "harness-bit-sums/1"}])
def test_digests_of_another_definition_are_not_compared(signed: dict[str, str]) -> None:
    """Oracle: what the statement says about how they were made."""
    order = execution.Order(
        config="", base="", signed={"determinism": {"settings": signed}}, world_size=1, checkpoint=None,
        last=3, gradients=[1], state=[], differences=True, repeat=False, answer="",
    )  # fmt: skip
    with pytest.raises(EvidenceIncomplete, match="harness-bit-sums/2"):
        execution._refuse_other_digests(order)
    execution._refuse_other_digests(dataclasses.replace(order, gradients=[]))
    ours = {"determinism": {"settings": {"step_digests": FORMAT}}}
    execution._refuse_other_digests(dataclasses.replace(order, signed=ours))
