"""Which class a resume has, from what differs."""

from __future__ import annotations

import copy
import os
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness import config
from harness.errors import EnvironmentFault, HarnessError, ResumeRefused, UsageError
from harness.format import strict_json
from harness.format.layout import RunFolder
from harness.settings import Settings
from harness.training.beginning import folder_lock, resume
from harness.training.replay import execution
from harness.training.statement.record import RunFacts, Segment

SETTINGS = {
    "run": {"dir": "runs/x"},
    "task": {"kind": "digits"},
    "train": {"steps": 10, "global_batch": 4, "micro_batch": 2},
}
STACK = {"torch": "2.13.0", "device": "cpu", "threads": 1}


def facts(**changes: Any) -> RunFacts:
    """A launch, with sections changed by name."""
    settings: dict[str, Any] = copy.deepcopy(SETTINGS)
    for key, value in changes.pop("config", {}).items():
        section, _, name = key.partition(".")
        if name:
            settings.setdefault(section, {})[name] = value
        else:
            settings[section] = value
    text = config.resolved_text(Settings.model_validate(settings))
    made = RunFacts(
        run={"id": "ab" * 16, "name": "x", "seed": 0},
        segment=Segment(1, "exact"),
        launch={"world_size": 1, "backend": "none", "command": ["harness"]},
        config={"sha256": "0" * 64, "text": text},
        code={"harness": "1", "git_commit": "a", "task": None},
        data={"kind": "digits", "corpus_sha256": "1" * 64, "tokenizer_sha256": None, "counts": {}},
        environment={"stack": STACK},
        determinism_mode="warn",
        determinism_settings={},
        policy={"name": "team.yaml", "sha256": "4" * 64},
    )
    return replace(made, **{name: {**getattr(made, name), **value} for name, value in changes.items()})


def statement(made: RunFacts) -> Mapping[str, Any]:
    """The part of a predicate that a resume compares."""
    names = ("launch", "config", "code", "data", "environment", "policy")
    return {name: getattr(made, name) for name in names}


CLASSES: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "exact"),
    "another folder and more checkpoints": ({"config": {"checkpoint": {"every": 3}}}, "exact"),
    "another command": ({"launch": {"command": ["torchrun", "harness"]}}, "exact"),
    "the same policy in another file": ({"policy": {"name": "ours.yaml"}}, "exact"),
    "world size": ({"launch": {"world_size": 2}}, "same-data"),
    "backend": ({"launch": {"backend": "gloo"}}, "same-data"),
    "micro-batch": ({"config": {"train.micro_batch": 1}}, "same-data"),
    "torch": ({"environment": {"stack": {**STACK, "torch": "2.14.0"}}}, "same-data"),
    "a new fact of the stack": ({"environment": {"stack": {**STACK, "driver": "1"}}}, "same-data"),
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "seed": ({"config": {"run.seed": 5}}, "config"),
    "batch": ({"config": {"train.global_batch": 8}}, "config"),
    "precision": ({"config": {"precision": "bf16"}}, "config"),
    "corpus": ({"data": {"corpus_sha256": "2" * 64}}, "data"),
    "tokenizer": ({"data": {"tokenizer_sha256": "2" * 64}}, "tokenizer"),
    "what it began with": ({"config": {"start": {"checkpoint": "base/checkpoints/step-00000003"}}}, "config"),
    "policy": ({"policy": {"sha256": "5" * 64}}, "policy"),
    "commit": ({"code": {"git_commit": "b"}}, "code"),
    "the task's source": ({"code": {"task": {"import_path": "a:B", "sha256": "3" * 64}}}, "code"),
}


@pytest.mark.parametrize("name", CLASSES)
def test_a_resume_that_is_the_same_run_has_its_class(name: str) -> None:
    """Oracle: the README."""
    changes, expected = CLASSES[name]
    kind, differences = resume.classify(statement(facts()), facts(**changes), ())
    assert kind == expected
    assert bool(differences) == (expected != "exact")


@pytest.mark.parametrize("name", REFUSED)
def test_another_run_is_refused_until_its_kind_is_accepted(name: str) -> None:
    """Oracle: the README; the answer that the error proposes is the one that works."""
    changes, kind = REFUSED[name]
    before, now = statement(facts()), facts(**changes)
    others = tuple(each for each in resume.ACCEPTABLE if each != kind)
    for accept in ((), others):
        with pytest.raises(ResumeRefused, match=f"--accept {kind} --reason"):
            resume.classify(before, now, accept)
    found, differences = resume.classify(before, now, (kind,))
    assert found == "accepted"
    assert len(differences) == 1


def test_a_checkout_that_git_refuses_to_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: git itself, told by a variable of its own tests that the repository is somebody else's; by a
    resume and by a replay, exit code 3 with what git says to do. Who accepts other code goes on."""
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    before, now = statement(facts()), facts(code={"git_commit": None})
    with pytest.raises(ResumeRefused, match=r"code\.git_commit: a → None"):
        resume.classify(before, now, ())
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)  # where safe.directory may allow every folder
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", os.devnull)
    told = f"git refuses to read this checkout.*--add safe.directory {tmp_path}"
    with pytest.raises(EnvironmentFault, match=told):
        resume.classify(before, now, ())
    with pytest.raises(EnvironmentFault, match=told):
        execution._refuse(list(resume.changes(before, now)), accepted=True)
    assert resume.classify(before, now, ("code",))[0] == "accepted"


def test_everything_that_differs_is_listed() -> None:
    """Oracle: both kinds in the proposed answer."""
    now = facts(config={"run.seed": 5}, data={"corpus_sha256": "2" * 64})
    with pytest.raises(ResumeRefused, match=r"run\.seed.*data\.corpus_sha256.*--accept config,data"):
        resume.classify(statement(facts()), now, ())


def test_changed_corpus_files_are_named(tmp_path: Path) -> None:
    """Oracle: one file of each kind of change."""
    path = tmp_path / "corpus.json"
    before = {"same": "1" * 64, "changed": "2" * 64, "gone": "3" * 64}
    path.write_bytes(strict_json.dumps({"format": "harness-corpus/1", "files": before}))
    now = {"same": "1" * 64, "changed": "4" * 64, "new": "5" * 64}
    changed = {item.what: (item.before, item.after) for item in resume.changed_files(path, now)}
    assert changed == {
        "file changed": ("2" * 12 + "…", "4" * 12 + "…"),
        "file gone": ("3" * 12 + "…", "absent"),
        "file new": ("absent", "5" * 12 + "…"),
    }


@pytest.mark.parametrize("note", [b"", b"x\n"])
def test_a_log_that_is_damaged_says_how_to_go_on(note: bytes, tmp_path: Path) -> None:
    """Oracle: the two ways that are left, in the error that stops a requeue loop."""
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "checkpoint").write_bytes(note)
    with pytest.raises(HarnessError) as caught:
        resume._read_log(RunFolder(tmp_path), resume.Found(None, None, ()), [])
    assert "restore log/" in str(caught.value)
    assert "start.checkpoint" in str(caught.value)


def test_no_run_begins_among_what_is_signed(tmp_path: Path) -> None:
    """Oracle: a checkpoint with another file in it verifies no longer; nothing is made there."""
    for name in ("checkpoints", "log"):
        (tmp_path / name).mkdir()
    inside = tmp_path / "checkpoints" / "step-00000003" / "run"
    settings = Settings.model_validate({**SETTINGS, "run": {"dir": str(inside)}})
    with pytest.raises(UsageError, match="which holds what is signed"):
        resume.hold(settings, print)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_folder_whose_job_is_just_ending_is_waited_for(tmp_path: Path) -> None:
    """Oracle: the lock of another descriptor, which lets go as soon as it is told that somebody waits."""
    other = folder_lock.take(tmp_path, print)
    said: list[str] = []

    def let_go(text: str) -> None:
        said.append(text)
        os.close(other)

    mine = folder_lock.take(tmp_path, let_go)
    assert len(said) == 1
    assert "held by another job" in said[0]
    os.close(mine)
