"""A run that begins with another run's checkpoint: what it takes, whom it believes, and what it refuses."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import run_folder
import torch
from attack import flip, trusted
from conftest import Place
from run_folder import SampleRun
from safetensors.torch import load_file
from toy_task import config

from harness import config as configs
from harness.audit.folders import story
from harness.errors import ConfigError, EvidenceIncomplete, HarnessError, ResumeRefused, VerificationFailed
from harness.format.layout import RunFolder
from harness.provenance.policy.rules import Policy
from harness.settings import Settings
from harness.training.beginning import start
from harness.training.beginning.start import Origin
from harness.training.statement.record import Difference, Segment
from harness.workers import Workers

PLAIN = '{kind: "toy_task:Toy", options: {plain: true}}'
SHORT = "{steps: 3, global_batch: 12, micro_batch: 2}"
STILL = "{lr: 1.0e-30, ema: 0.5}"
"""A rate that moves no weight of fp32."""


def settings(folder: Path, **more: Any) -> Settings:
    """A config that begins with ``folder``."""
    return Settings.model_validate(
        {
            "run": {"dir": "x"},
            "task": {"kind": "digits"},
            "train": {"steps": 1, "global_batch": 1, "micro_batch": 1},
            "start": {"checkpoint": str(folder), **more},
        }
    )


@pytest.fixture
def parent(tmp_path: Path) -> SampleRun:
    """A run of checkpoints 10 and 20, whose config.json has two keys."""
    files = {"config.json": b'{"hidden_size":4,"rope_theta":10000.0}\n'}
    run = SampleRun(tmp_path / "parent", run_folder.identity(tmp_path / "me"), files=files)
    run.advance(10, 20)
    return run


def opened(run: SampleRun, step: int = 20, own: Policy | None = None, **more: Any) -> Origin:
    """What a new run gets; its own key is the parent's unless ``own`` says otherwise."""
    found = start.open_origin(
        Workers.alone(), settings(run.folder.checkpoint(step), **more), own or trusted(run.signer)
    )
    assert found is not None
    return found


def test_the_reference_is_what_the_statement_of_the_parent_says(parent: SampleRun) -> None:
    """Oracle: the folder that was written, read by the test."""
    origin = opened(parent)
    assert origin.reference == parent.saved[20].as_start(parent)
    assert "own key" in origin.trust


def test_a_config_without_a_start_begins_with_random_weights() -> None:
    """Oracle: the absence of the section."""
    bare = settings(Path("x")).model_copy(update={"start": None})
    assert start.open_origin(Workers.alone(), bare, None) is None


def test_only_who_is_trusted_may_have_signed_it(parent: SampleRun, tmp_path: Path) -> None:
    """Oracle: a stranger's key is refused, and the parent's key is accepted when the config names it."""
    stranger = trusted(run_folder.identity(tmp_path / "stranger"))
    with pytest.raises(VerificationFailed, match="is signed by none of the 1 accepted keys"):
        opened(parent, own=stranger)
    named = [str(tmp_path / "me.ed25519.pub"), str(tmp_path / "me.p256.pub")]
    assert opened(parent, own=stranger, key=named).trust == "trusted by start.key"
    policy = tmp_path / "team.yaml"
    identity = "{name: me, keys: [me.ed25519.pub], runs: [another]}"
    policy.write_text(f"format: harness-policy/1\nidentities: [{identity}]\n")
    with pytest.raises(VerificationFailed, match="may not sign for the run sample"):
        opened(parent, policy=str(policy))


def _flip_a_weight(folder: Path) -> None:
    flip(folder / "model.safetensors", -1)


def _flip_the_config(folder: Path) -> None:
    flip(folder / "config.json", 3)


def _remove_the_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _add_a_file(folder: Path) -> None:
    (folder / "extra.bin").write_bytes(b"x")


@pytest.mark.parametrize("change", [_flip_a_weight, _flip_the_config, _remove_the_weights, _add_a_file])
def test_nothing_is_used_of_a_checkpoint_that_was_changed(parent: SampleRun, change: Any) -> None:
    """Oracle: one change each; a weight is caught while it is read, everything else before."""
    change(parent.folder.checkpoint(20))
    with pytest.raises((VerificationFailed, EvidenceIncomplete)):
        _read(parent)


def _read(parent: SampleRun) -> None:
    loaded = opened(parent).loaded
    described = loaded.described("model").items()
    loaded.fill({("model", name): torch.empty(shape) for name, (_, shape) in described})


def test_what_cannot_be_a_start_is_refused(parent: SampleRun, tmp_path: Path) -> None:
    """Oracle: a run folder, nothing at all, a pruned checkpoint, the end of a run that went wrong."""
    with pytest.raises(ConfigError, match="which of its checkpoints is meant"):
        start.open_origin(Workers.alone(), settings(parent.root), trusted(parent.signer))
    with pytest.raises(HarnessError, match="no such folder"):
        start.open_origin(Workers.alone(), settings(tmp_path / "nothing"), trusted(parent.signer))
    parent.tweak = lambda step, facts: facts.update(outcome="nonfinite")
    parent.advance(30)
    aside = parent.saved[30].folder.rename(parent.folder.checkpoints / "nonfinite-step-00000030")
    with pytest.raises(VerificationFailed, match="became non-finite"):
        start.open_origin(Workers.alone(), settings(aside), trusted(parent.signer))
    pruned = parent.prune(10)
    with pytest.raises(EvidenceIncomplete, match="the payload was removed"):
        start.open_origin(Workers.alone(), settings(pruned), trusted(parent.signer))


def test_another_tokenizer_is_refused_until_it_is_accepted(parent: SampleRun) -> None:
    """Oracle: the parent has none; the answer that the error proposes is the one that works."""
    origin, bare = opened(parent), Segment(0, "genesis")
    files = {"config.json": b'{"hidden_size":4,"rope_theta":10000.0}\n'}
    assert start.first_segment(origin, None, files, (), bare) == bare
    with pytest.raises(ResumeRefused, match="--accept tokenizer --reason"):
        start.first_segment(origin, "a" * 64, files, ("data",), bare)
    accepted = start.first_segment(origin, "a" * 64, files, ("tokenizer",), bare)
    assert accepted.differences == (Difference("tokenizer", "none", "aaaaaaaaaaaa…"),)


def test_what_differs_in_the_model_is_signed(parent: SampleRun) -> None:
    """Oracle: two config.json with one key changed, one gone and one new."""
    files: Mapping[str, bytes] = {"config.json": b'{"hidden_size":4,"dropout":0.1}\n'}
    found = start.first_segment(opened(parent), None, files, (), Segment(0, "genesis"))
    assert found.differences == (
        Difference("config.json dropout", "absent", "0.1"),
        Difference("config.json rope_theta", "10000.0", "absent"),
    )


def test_keys_and_a_policy_at_once_are_a_config_error(tmp_path: Path) -> None:
    """Oracle: the line of the file."""
    path = tmp_path / "both.yaml"
    path.write_text(
        "run: {dir: x}\ntask: {kind: digits}\ntrain: {steps: 1, global_batch: 1, micro_batch: 1}\n"
        "start: {checkpoint: a, key: [b], policy: c}\n"
    )
    with pytest.raises(ConfigError, match="choose one"):
        configs.load(path)


@pytest.mark.slow
def test_a_child_begins_with_the_weights_and_nothing_else(place: Place) -> None:
    """Oracle: at a rate that moves nothing, the child's weights and average are the parent's, bit for bit, on
    two processes as well; its optimizer has taken one step."""
    place.write(
        "base.yaml",
        config(place.root / "base", task=PLAIN, train=SHORT),
    )
    assert place.harness("train", "base.yaml").code == 0
    weights = place.root / "base" / "checkpoints" / "step-00000003"
    extra = {
        "run": f"{{dir: {place.run}, seed: 4}}", "start": f"{{checkpoint: {weights}}}", "task": PLAIN,
        "optimizer": STILL, "train": "{steps: 1, global_batch: 12, micro_batch: 2}", "parallel": "fsdp2",
    }  # fmt: skip
    place.write("child.yaml", config(place.run, **extra))
    done = place.harness("train", "child.yaml", processes=2)
    assert done.code == 0, done.err
    assert "begins with   weights of step 3 of base" in done.out
    child = place.run / "checkpoints" / "step-00000001"
    before, after = (_tensors(folder, "model") for folder in (weights, child))
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    optimizer = _tensors(child, "optimizer-")
    assert all(torch.equal(optimizer[f"ema.{name}"], before[name]) for name in before)
    assert {float(value) for name, value in optimizer.items() if name.endswith(".step")} == {1.0}
    public = place.root / "config" / "harness"
    words = ["--key", str(public / "default.ed25519.pub"), str(public / "default.p256.pub")]
    checked = place.harness("verify", str(place.run), *words, "--with", str(weights.parent.parent))
    assert (checked.code, "start" in checked.out) == (0, True), checked.out


@pytest.mark.slow
def test_a_child_resumes_without_its_parent(place: Place) -> None:
    """Oracle: the parent is gone at the resume, which is exact, and every statement still names it."""
    place.write("base.yaml", config(place.root / "base", train=SHORT))
    assert place.harness("train", "base.yaml").code == 0
    paused = '{kind: "toy_task:Toy", options: {pause: 15}}'
    begun = "{checkpoint: base/checkpoints/step-00000003}"
    place.write("child.yaml", config(place.run, start=begun, task=paused))
    place.start_and_kill("checkpoints/step-00000006", ["train", "child.yaml"])
    shutil.rmtree(place.root / "base")
    again = place.harness("train", "child.yaml")
    assert again.code == 0, again.err
    assert "began with    step 3 of base" in again.out
    assert "exact: same stack" in again.out
    told = [story.unverified(folder).statement.start for folder in RunFolder(place.run).complete()]
    assert len(told) == 4
    assert {each and each["step"] for each in told} == {3}


def _tensors(folder: Path, prefix: str) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob(f"{prefix}*.safetensors")):
        found |= load_file(path)
    assert found
    return found
