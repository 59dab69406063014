"""`harness doctor`: what it finds when something really is wrong."""

from __future__ import annotations

import fcntl
import json
import os
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import authority
import pytest
import run_folder
from authority import Authority
from object_store import Bucket

from harness import environment
from harness.cli import main
from harness.provenance.signing import keys
from harness.settings import Settings
from harness.stores.client import ObjectStore
from harness.training.doctor import machine, one_config
from harness.training.doctor.machine import Check
from harness.words import human_bytes

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
    assert f"{human_bytes(planned['disk_bytes'])} of checkpoints to come" in checks["disk"]["text"]


WRONG: dict[str, tuple[Sequence[str], str, str]] = {
    "batch": (["--world-size", "3"], "batch", "no multiple of 4 x 3 processes"),
    "key": (["signing.key=/nowhere/me.key"], "signing key", "/nowhere/me.key"),
    "folder": (["run.dir=/proc/run"], "run.dir", "cannot write"),
    "wandb": (["track.wandb=online"], "wandb", "no API key"),
    "config": (["train.stepz=3"], "config", "train.steps"),
    "world size": (["--world-size", "2", "train.world_size=1"], "world size", "2 processes are to run"),
    "precision": (["precision=fp8"], "precision", "fp8 is not available"),
    "task": (["task.options={shift: 99}"], "task", "task.options.shift"),
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
    assert checks[check]["remedy"] or check in ("config", "signing key", "task")


def test_compiled_code_without_a_compiler_is_bad_before_and_refused_at_the_start(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: a compiler that is not there, then Python's headers in an empty folder; without `compile`
    nothing is asked for."""
    monkeypatch.setenv("CXX", str(path.parent / "g++"))
    assert "compile" not in examine(path, capsys)[1]
    _, checks = examine(path, capsys, "compile=true")
    assert (checks["compile"]["level"], checks["compile"]["text"]) == (
        "bad",
        f"no C++ compiler {path.parent / 'g++'} is on PATH",
    )
    assert main(["train", str(path), "compile=true"]) == 3
    assert "which compiled code on a CPU needs: compile; install one" in capsys.readouterr().err
    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(path.parent))
    _, checks = examine(path, capsys, "compile=true")
    assert checks["compile"]["text"] == f"{path.parent} has no Python.h"
    (path.parent / "Python.h").touch()
    assert examine(path, capsys, "compile=true")[1]["compile"]["level"] == "ok"


LANGUAGE: dict[str, tuple[Sequence[str], str, str]] = {
    "wheel": (["data.packages=[torch]"], "ok", "files of kind wheel"),
    "no wheel": (["data.packages=[no-such-package]"], "bad", "not installed"),
    "text": (["data.kind=text", "data.files=['*.yaml']"], "ok", "1 files of kind text"),
    "no text": (["data.kind=text", "data.files=['*.txt']"], "bad", "nothing matches '*.txt'"),
    "tokens": (["data.kind=tokens", "data.files=['*.bin']"], "bad", "nothing matches '*.bin'"),
    "own": (["data.kind=mine:Corpus"], "ok", "was not looked at"),
}


@pytest.mark.parametrize("name", LANGUAGE)
def test_a_corpus_that_is_not_there_is_bad(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Oracle: the files of the folder; they are looked for, not read, and torch is not needed for that."""
    monkeypatch.setattr(environment, "missing", lambda names: list(names))
    words, level, text = LANGUAGE[name]
    _, checks = examine(path, capsys, "task.kind=language", *words)
    assert checks["data"]["level"] == level
    assert text in checks["data"]["text"]


def test_a_job_at_work_in_the_folder_is_seen(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the lock that `harness train` takes."""
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


def test_what_was_cut_off_is_named(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: folders as a save and a fetch leave them."""
    run = path.parent / "run"
    for name in (".tmp-log", "checkpoints/.tmp-step-00000012", "checkpoints/step-00000006"):
        (run / name).mkdir(parents=True)
    _, checks = examine(path, capsys)
    said = "left by what was cut off, removed by the next launch: .tmp-log, .tmp-step-00000012"
    assert checks["leftovers"]["text"] == said
    assert sorted(each.name for each in run.rglob(".tmp-*")) == [".tmp-log", ".tmp-step-00000012"]


def test_a_key_that_a_first_run_could_not_make_is_bad(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: nobody makes a folder in /proc, root neither; `harness train` would leave with 3."""
    monkeypatch.setenv("XDG_CONFIG_HOME", "/proc/config")
    code, checks = examine(path, capsys)
    assert code == 1
    assert checks["signing key"]["level"] == "bad"
    assert "signing.key" in checks["signing key"]["remedy"]


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
    assert all(check.level != "bad" for check in machine.machine(None, training=False))
    code, checks = examine(path, capsys)
    assert code == 1
    assert "torch" in checks["packages"]["text"]
    assert "[train]" in checks["packages"]["remedy"]


def test_several_cpu_threads_are_a_warning(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: docs/determinism.md."""
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    monkeypatch.setattr("shutil.which", lambda name: None)
    _, checks = examine(path, capsys)
    assert checks["threads"]["level"] == "warn"


def policy_file(folder: Path, public: Sequence[Path], more: str = "") -> Path:
    """A policy with one identity that holds ``public``."""
    listed = ", ".join(file.name for file in public)
    made = folder / "policy.yaml"
    made.write_text(f"format: harness-policy/1\nidentities:\n  - name: a\n    keys: [{listed}]\n{more}")
    return made


@pytest.mark.parametrize(
    ("more", "level", "text"),
    [
        ("", "ok", "accepts the signing key"),
        ('    runs: ["other-*"]\n', "bad", "may not sign for the run run"),
        ("    valid: {until: 2020-01-01}\n", "bad", "valid until"),
        ("surprise: 1\n", "bad", "surprise"),
    ],
)
def test_a_policy_is_held_against_the_key_that_would_sign(
    path: Path, capsys: pytest.CaptureFixture[str], more: str, level: str, text: str
) -> None:
    """Oracle: the policy's own rules, as docs/verify.md tells them."""
    files = keys.create(path.parent / "me")
    rules = policy_file(path.parent, files.public, more)
    code, checks = examine(path, capsys, "--policy", str(rules), f"signing.key={files.private}")
    assert code == (level == "bad")
    assert checks["policy"]["level"] == level
    assert text in checks["policy"]["text"]


def test_a_policy_of_other_people_or_with_the_key_revoked_is_bad(tmp_path: Path) -> None:
    """Oracle: two identities made here; a second signature that is asked for is a warning."""
    mine, other = keys.create(tmp_path / "mine"), keys.create(tmp_path / "other")
    signer = keys.load_signer(mine.private)
    revoked = f'revoked: ["{keys.load_public(mine.public[0]).key_id}"]\n'
    both = f"  - {{name: b, keys: [{other.public[0].name}]}}\n"

    def told(public: Sequence[Path], more: str = "", by: keys.Signer | None = signer) -> Check:
        (line,) = one_config.trusted(policy_file(tmp_path, public, more), by, None)
        return line

    lines = {
        "other": told(other.public),
        "revoked": told(mine.public, both + revoked),
        "two": told(mine.public, both + "threshold: 2\n"),
        "no key": told(mine.public, by=None),
    }
    assert {name: line.level for name, line in lines.items()} == {
        "other": "bad", "revoked": "bad", "two": "warn", "no key": "ok",
    }  # fmt: skip
    assert "does not know the ed25519 key" in lines["other"].text
    assert "is revoked" in lines["revoked"].text


def test_versions_are_held_against_the_lock_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: a lock file and installed versions written here; a build tag is no other version."""
    installed = {"torch": "2.13.0+cpu", "numpy": "2.0.0", "more": "1"}
    monkeypatch.setattr(environment, "packages", lambda: installed)
    lock = tmp_path / "requirements.lock"
    assert list(machine.locked(lock)) == []
    lock.write_text("# versions\ntorch==2.13.0\nnumpy==2.0.0\nabsent==3\n")
    (same,) = machine.locked(lock)
    assert (same.level, same.text) == ("ok", "2 packages are as requirements.lock says")
    lock.write_text("torch==2.12.0\nnumpy==2.0.0\n")
    (other,) = machine.locked(lock)
    assert other.level == "warn"
    assert "torch 2.13.0+cpu (lock: 2.12.0)" in other.text


GPUS: dict[str, tuple[str | None, str, str]] = {
    "as many": (None, "ok", "2 GPU(s)"),
    "fewer": ("0", "warn", "fewer than 2 processes"),
    "hidden": ("", "warn", "would use the CPU"),
    "beyond": ("1,7,0", "warn", "1 of them"),
}


@pytest.mark.parametrize("name", GPUS)
def test_gpus_are_counted_as_cuda_shows_them(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Oracle: an nvidia-smi of this test; CUDA ignores everything from the first unknown device on."""
    tool = path.parent / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho H200, 1 MiB, 570\necho H200, 1 MiB, 570\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(path.parent), prepend=os.pathsep)
    shown, level, text = GPUS[name]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if shown is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    found = [check for check in machine.machine(2, training=False) if check.name == "devices"]
    assert found[0].level == level
    assert text in found[0].text


def test_a_run_that_is_nearly_done_needs_only_what_is_to_come(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: one checkpoint of two is there."""
    words = ["checkpoint.every=5"]
    assert main(["plan", str(path), *words, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["disk_bytes"] == 2 * planned["checkpoint_bytes"]
    (path.parent / "run" / "checkpoints" / "step-00000005").mkdir(parents=True)
    _, checks = examine(path, capsys, *words)
    assert f"{human_bytes(planned['checkpoint_bytes'])} of checkpoints to come" in checks["disk"]["text"]
    assert "continues from step-00000005" in checks["run"]["text"]


def test_the_start_of_a_child_run_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the parent as it was made, then with one byte more in its manifest."""
    monkeypatch.chdir(tmp_path)
    signer = run_folder.identity(tmp_path / "me")
    parent = run_folder.checkpoint(run_folder.build(tmp_path / "parent", signer), 30)
    begun = {"start": {"checkpoint": str(parent), "key": ["me.ed25519.pub"]}}
    made = Settings.model_validate(
        {
            "run": {"dir": "child"},
            "task": {"kind": "digits"},
            "train": {"steps": 1, "global_batch": 1, "micro_batch": 1},
            **begun,
        }
    )
    (check,) = one_config._start(made, None)
    assert (check.level, "step 30 of sample, trusted by start.key" in check.text) == ("ok", True)
    manifest = parent / "MANIFEST.json"
    manifest.write_bytes(manifest.read_bytes() + b" ")
    (check,) = one_config._start(made, None)
    assert check.level == "bad"


def test_a_store_is_tried_and_left_as_it_was(
    bucket: Bucket, path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: boto3, another client; a bucket that is not there; a store that makes an object twice."""
    code, checks = examine(path, capsys, f"checkpoint.store={bucket.url}")
    assert (code, checks["store"]["level"]) == (0, "ok")
    assert "it holds 0 checkpoints" in checks["store"]["text"]
    assert bucket.names() == []
    code, checks = examine(path, capsys, "checkpoint.store=s3://no-such-bucket/run")
    assert (code, "NoSuchBucket" in checks["store"]["text"]) == (1, True)
    monkeypatch.setattr(ObjectStore, "create", ObjectStore.put)
    code, checks = examine(path, capsys, f"checkpoint.store={bucket.url}")
    assert (code, "makes an object twice" in checks["store"]["text"]) == (1, True)
    assert bucket.names() == []


def test_the_authority_of_timestamps_is_asked_and_held_against_the_policy(tmp_path: Path) -> None:
    """Oracle: OpenSSL's authority under a policy that names it, one that names another, and nobody there."""
    run_folder.identity(tmp_path / "me")
    tsa, policies = Authority("tsa"), dict[str, Path]()
    for name, each in (("own", tsa), ("other", Authority("tsa"))):
        (tmp_path / f"{name}.pem").write_bytes(each.root.public_bytes(authority.Encoding.PEM))
        more = f"timestamps: {{certificates: [{name}.pem]}}\n"
        made = policy_file(tmp_path, [tmp_path / "me.ed25519.pub"], more)
        policies[name] = made.rename(tmp_path / f"{name}.yaml")

    def told(url: str, rules: Path | None) -> Check:
        settings = Settings.model_validate(
            {
                "run": {"dir": str(tmp_path / "run")},
                "task": {"kind": "digits"},
                "train": {"steps": 1, "global_batch": 1, "micro_batch": 1},
                "signing": {"timestamp": url},
            }
        )
        (found,) = one_config.timestamps(settings, rules)
        return found

    with authority.answering(tsa.openssl(tmp_path)) as url:
        for rules in (None, policies["own"]):
            found = told(url, rules)
            assert (found.level, found.name) == ("ok", "timestamps")
            assert f"{url} answers as CN=tsa" in found.text
        found = told(url, policies["other"])
        assert (found.level, "no certificate of the policy vouches" in found.text) == ("bad", True)
    assert told("http://127.0.0.1:1/", None).level == "warn"
