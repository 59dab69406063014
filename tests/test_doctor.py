"""`harness doctor`: what it finds when something really is wrong."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from harness import environment
from harness.cli import main
from harness.provenance import keys
from harness.training import checkup

CONFIG = """\
run: {dir: %s}
task: {kind: digits}
train: {steps: 10, global_batch: 8, micro_batch: 4}
"""


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config in a home of its own."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("HARNESS_SIGNING_KEY", "WANDB_API_KEY", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    made = tmp_path / "c.yaml"
    made.write_text(CONFIG % (tmp_path / "run"))
    return made


def examine(path: Path, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    """Exit code, and name → check, through the command line."""
    code = main(["doctor", str(path), *words, "--json"])
    document = json.loads(capsys.readouterr().out)
    assert document["good"] == (code == 0)
    return code, {check["name"]: check for check in document["checks"]}


def test_a_sound_machine_and_config_are_good_and_nothing_is_made(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: exit code 0, a warning for the key that is still to be made, and no new file."""
    code, checks = examine(path, capsys)
    assert code == 0
    assert checks["signing key"]["level"] == "warn"
    assert checks["batch"]["text"] == "8 = 4 x 1 processes x 2 accumulated"
    assert list(path.parent.iterdir()) == [path]


def test_the_disk_that_is_needed_is_that_of_the_plan(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: `harness plan` of the same config."""
    assert main(["plan", str(path), "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    _, checks = examine(path, capsys)
    from harness.terminal import human_bytes

    assert f"{human_bytes(planned['disk_bytes'])} of checkpoints to come" in checks["disk"]["text"]


WRONG: dict[str, tuple[Sequence[str], str, str]] = {
    "batch": (["--world-size", "3"], "batch", "no multiple of 4 x 3 processes"),
    "key": (["signing.key=/nowhere/me.key"], "signing key", "/nowhere/me.key"),
    "folder": (["run.dir=/proc/run"], "run.dir", "cannot write"),
    "wandb": (["track.wandb=online"], "wandb", "no API key"),
    "config": (["train.stepz=3"], "config", "train.steps"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_bad_and_has_a_remedy(
    path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """Oracle: exit code 1 and the check by its name."""
    words, check, text = WRONG[name]
    code, checks = examine(path, capsys, *words)
    assert code == 1
    assert checks[check]["level"] == "bad"
    assert text in checks[check]["text"]


def test_a_job_at_work_in_the_folder_is_seen(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the same lock that `harness train` takes."""
    run = path.parent / "run"
    run.mkdir()
    descriptor = os.open(run, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        code, checks = examine(path, capsys)
    finally:
        os.close(descriptor)
    assert code == 1
    assert "another job is training" in checks["run"]["text"]


def test_a_key_without_a_model_half_is_a_warning(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: an OpenSSH Ed25519 key, which has no P-256 half."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    file = path.parent / "id_ed25519"
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
    file.write_bytes(Ed25519PrivateKey.generate().private_bytes(*form))
    file.chmod(0o600)
    code, checks = examine(path, capsys, f"signing.key={file}")
    assert code == 0
    assert "no P-256 key" in checks["signing key"]["text"]
    assert keys.load_signer(file).p256 is None


def test_without_torch_only_a_config_makes_that_bad(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: an auditor's machine is sound; a training machine without torch is not."""
    monkeypatch.setattr(environment, "missing", lambda names: list(names))
    assert all(check.level != "bad" for check in checkup.run(None, [], None))
    code, checks = examine(path, capsys)
    assert code == 1
    assert "torch" in checks["packages"]["text"]
    assert "[train]" in checks["packages"]["remedy"]


def test_several_cpu_threads_are_a_warning(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: docs/determinism.md."""
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    monkeypatch.setattr(checkup.shutil, "which", lambda name: None)
    _, checks = examine(path, capsys)
    assert checks["threads"]["level"] == "warn"
