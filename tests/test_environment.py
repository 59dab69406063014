"""What a statement says about machine and code, and what it must not say."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import tomllib
from pathlib import Path

import pytest

from harness import environment
from harness.errors import EnvironmentFault
from harness.provenance import statements
from harness.provenance.schema import check
from harness.training.statement.record import plain


def test_the_facts_are_what_a_statement_can_hold_and_stay_the_same() -> None:
    """Oracle: the published schema, and a second look."""
    facts = plain(environment.facts())
    check(facts, where="environment", schema=statements.SCHEMA["properties"]["environment"])
    assert plain(environment.facts()) == facts
    assert facts["packages"]["torch"]


def test_no_secret_and_no_private_name_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: values that this test plants in the environment."""
    for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "NCCL_COMM_ID", "NCCL_TOPO_FILE"):
        monkeypatch.setenv(name, "sesame")
    monkeypatch.setenv("OMP_PLACES", f"{Path.home()}/places on {socket.gethostname()}")
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    told = repr(environment.facts())
    assert "sesame" not in told
    assert str(Path.home()) not in told or str(Path.home()) == "/"
    assert environment.facts()["variables"]["OMP_PLACES"] == "~/places on <host>"
    assert environment.facts()["variables"]["NCCL_ALGO"] == "Ring"


def test_the_packages_of_a_statement_are_those_that_the_project_needs() -> None:
    """Oracle: pyproject.toml; an environment built from a statement holds nothing else."""
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]

    def names(lines: list[str]) -> list[str]:
        return sorted(re.split(r"[<>=]", line)[0] for line in lines)

    assert sorted(environment.AUDITING) == names(project["dependencies"])
    assert sorted(environment.TRAINING) == names(project["optional-dependencies"]["train"])


def git(folder: Path, *words: str) -> str:
    """A git command with an identity of its own."""
    environ = {**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null", "HOME": str(folder)}
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(
        ["git", *identity, *words], cwd=folder, env=environ, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A git repository with one commit."""
    git(tmp_path, "init", "-q")
    (tmp_path / "a.py").write_text("x = 1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    return tmp_path


def test_a_clean_repository_is_its_commit(repository: Path) -> None:
    """Oracle: git itself."""
    code = environment.code(repository)
    assert code["git_commit"] == git(repository, "rev-parse", "HEAD")
    assert (code["dirty"], code["diff_sha256"]) == (False, None)


def test_every_change_of_the_code_has_a_digest_of_its_own(repository: Path) -> None:
    """Oracle: five different trees; files that are no code do not count."""
    seen = [environment.code(repository)["diff_sha256"]]
    for name, text in (("a.py", "x = 2\n"), ("a.py", "x = 3\n"), ("b.py", "y = 1\n"), ("b.py", "y = 2\n")):
        (repository / name).write_text(text)
        code = environment.code(repository)
        assert code["dirty"] is True
        seen.append(code["diff_sha256"])
    assert len(set(seen)) == 5
    (repository / "notes.txt").write_text("nothing")
    assert environment.code(repository)["diff_sha256"] == seen[-1]


def test_outside_a_repository_nothing_is_claimed(tmp_path: Path) -> None:
    """Oracle: a folder without git."""
    code = environment.code(tmp_path)
    assert (code["git_commit"], code["dirty"], code["diff_sha256"]) == (None, None, None)


def test_the_digest_of_the_sources_follows_names_and_bytes(tmp_path: Path) -> None:
    """Oracle: a change of each."""
    (tmp_path / "a.py").write_text("1")
    first = environment.source_digest(tmp_path)
    (tmp_path / "a.py").write_text("2")
    second = environment.source_digest(tmp_path)
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert len({first, second, environment.source_digest(tmp_path)}) == 3


def test_training_without_its_packages_says_what_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the command in the message names the extra."""
    environment.require_training()
    monkeypatch.setattr(environment, "missing", lambda names: ["torch"])
    with pytest.raises(EnvironmentFault, match=r"training needs torch.*pip install .*\[train\]"):
        environment.require_training()
