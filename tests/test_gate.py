"""Gates: what verifies passes, and nothing else does. Real processes, from the published definitions."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import run_folder
import yaml
from conftest import TIMEOUT

from harness.audit.verification import gate
from harness.provenance.policy import rules
from harness.provenance.policy.rules import Policy
from harness.provenance.signing import keys

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``alice``'s keys, ``policy.yaml``, and in ``models`` a run and a lone checkpoint."""
    place = tmp_path_factory.mktemp("gate")
    signer = run_folder.identity(place / "alice")
    run_folder.build(place / "models" / "run", signer, steps=(10, 20))
    source = run_folder.checkpoint(place / "models" / "run", 20)
    shutil.copytree(source, place / "models" / "alone" / source.name)
    identity = "  - {name: alice, keys: [alice.ed25519.pub, alice.p256.pub]}"
    (place / "policy.yaml").write_text(f"format: harness-policy/1\nidentities:\n{identity}\n")
    return place


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    """A copy of its own, to be tampered with."""
    return Path(shutil.copytree(made, tmp_path / "place"))


def trust(place: Path) -> Policy:
    """Alice, and nobody else."""
    return rules.from_keys([keys.load_public(place / f"alice.{kind}.pub") for kind in ("ed25519", "p256")])


def run(command: str, place: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """A line of shell in ``place``, with `harness` and `python` being this checkout's."""
    programs = place / "programs"
    programs.mkdir(exist_ok=True)
    for name, words in {"harness": "-m harness ", "python": ""}.items():
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words}"$@"\n')
        (programs / name).chmod(0o755)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environ = {**os.environ, "PYTHONPATH": path, "PATH": f"{programs}:{os.environ['PATH']}", **environ}
    shell = ["bash", "-eo", "pipefail", "-c", command]  # as GitHub runs a step
    return subprocess.run(
        shell, cwd=place, env=environ, capture_output=True, text=True, check=False, timeout=TIMEOUT
    )


def flip(place: Path) -> None:
    """One byte of a tensor."""
    file = run_folder.checkpoint(place / "models" / "run", 20) / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def pre_commit(place: Path) -> subprocess.CompletedProcess[str]:
    """The hook as pre-commit calls it: entry, then args, no file names."""
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    assert hook["always_run"]
    assert not hook["pass_filenames"]
    return run(f"{hook['entry']} {shlex.join(['models', '--policy', 'policy.yaml'])}", place)


def action(place: Path) -> subprocess.CompletedProcess[str]:
    """The action's last step, its inputs filled in as GitHub does."""
    step = yaml.safe_load((ROOT / "action.yml").read_text())["runs"]["steps"][-1]
    inputs = {"inputs.path": "models", "inputs.policy": "policy.yaml"}
    environ = {name: inputs[value.strip("${} ")] for name, value in step["env"].items()}
    return run(step["run"], place, **environ)


def server(place: Path) -> subprocess.CompletedProcess[str]:
    """The example, with the newest checkpoint of the run."""
    model = run_folder.checkpoint(Path("models/run"), 20)
    return run(f"python {ROOT}/examples/serving_gate.py {model} policy.yaml", place)


@pytest.mark.parametrize("enter", [pre_commit, action, server])
def test_what_verifies_passes_and_one_flipped_bit_does_not(
    place: Path, enter: Callable[[Path], subprocess.CompletedProcess[str]]
) -> None:
    """Oracle: the same folder before and after; the tensor with the bit is named."""
    good = enter(place)
    assert good.returncode == 0, good.stderr
    flip(place)
    bad = enter(place)
    assert bad.returncode == 1
    assert "head.bias" in bad.stdout + bad.stderr


def test_a_gate_takes_no_unsigned_weights_wherever_they_lie(place: Path) -> None:
    """Oracle: one addition a time, each a path that is then named."""
    assert gate.examine([place / "models"], trust(place)).exit_code == 0
    checkpoints = place / "models" / "run" / "checkpoints"
    names = ("models/new/model.safetensors", "models/run/extra.pt", "models/run/events/x.BIN")
    for name in (*names, "models/new/__0_0.distcp"):
        file = place / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"x")
        passage = gate.examine([place / "models"], trust(place))
        assert [each.path for each in passage.refusals] == [file]
        assert passage.verdict == "refused"
        file.unlink()
    for prefix, code in (("damaged-", 1), (".tmp-", 4)):
        shutil.copytree(checkpoints / "step-00000010", checkpoints / f"{prefix}step-00000010-1")
        passage = gate.examine([place / "models"], trust(place))
        assert {each.path.name for each in passage.refusals} >= {"model.safetensors"}
        assert passage.exit_code == code
        shutil.rmtree(checkpoints / f"{prefix}step-00000010-1")
    (place / "models" / "link").symlink_to(checkpoints / "step-00000010")
    assert [each.path.name for each in gate.examine([place / "models"], trust(place)).refusals] == ["link"]


def test_folders_without_an_end_are_not_followed_and_not_let_through(place: Path) -> None:
    """Oracle: one refusal, beside a run and in it; 70 folders, where a stranger can make thousands."""
    for above in ("models", "models/run/events"):
        (place / above / "/".join("a" * 70)).mkdir(parents=True)
        passage = gate.examine([place / "models"], trust(place))
        assert [("nested deeper than 64" in each.what) for each in passage.refusals] == [True]
        assert passage.exit_code == 1
        shutil.rmtree(place / above / "a")


def test_a_checkpoint_whose_signatures_were_removed_is_refused(place: Path) -> None:
    """Oracle: whatever of them goes, exit code 1 or 4, never 0."""
    alone = place / "models" / "alone" / "step-00000020"
    for name in ("provenance/checkpoint.sigstore.json", "model.sig", "provenance", "MANIFEST.json"):
        shutil.rmtree(alone / name) if (alone / name).is_dir() else (alone / name).unlink()
        assert gate.examine([place / "models"], trust(place)).exit_code in (1, 4)
    alone.rename(place / "models" / "alone" / "other")
    passage = gate.examine([place / "models" / "alone"], trust(place))
    assert passage.exit_code == 1
    assert {each.what for each in passage.refusals} == {"is weights that no verified folder holds"}


def test_nothing_to_verify_is_no_pass(place: Path) -> None:
    """Oracle: exit code 4 for an empty folder, 2 for one that is not there or without trust."""
    (place / "empty").mkdir()
    done = run("harness gate empty --policy policy.yaml --json", place)
    assert (done.returncode, json.loads(done.stdout)["verdict"]) == (4, "cannot tell")
    assert run("harness gate nowhere --policy policy.yaml", place).returncode == 2
    assert run("harness gate models", place).returncode == 2
