"""The shell scripts: they parse, they are short, and every command they name exists."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TIMEOUT

from harness.cli import VERBS

ROOT = Path(__file__).resolve().parent.parent
SHELL = [ROOT / "speedrun.sh", ROOT / ".ci" / "run", *sorted((ROOT / "scripts").glob("*.sh"))]
PYTHON = sorted((ROOT / "scripts").rglob("*.py"))
SPEEDRUN_LINES = 50
"""The speedrun reads as a table of contents."""


def ran(*command: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    """``command`` with its output as text; never raises for its exit code."""
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=TIMEOUT, **options)  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize("script", SHELL, ids=lambda path: path.name)
def test_a_shell_script_parses_and_may_be_started(script: Path) -> None:
    """Oracle: `bash -n`, and the execute bit."""
    assert ran("bash", "-n", script).returncode == 0
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize("script", SHELL, ids=lambda path: path.name)
def test_a_shell_script_stops_at_unset_variables_and_broken_pipes(script: Path) -> None:
    """Oracle: the options themselves; `must_fail.sh` alone runs on after a failure, as is its purpose."""
    wanted = "set -uo pipefail" if script.name == "must_fail.sh" else "set -euo pipefail"
    assert wanted in script.read_text()


def test_the_speedrun_is_a_page_long() -> None:
    """Oracle: the limit above."""
    assert len((ROOT / "speedrun.sh").read_text().splitlines()) <= SPEEDRUN_LINES


def test_every_verb_and_file_that_the_speedrun_names_exists() -> None:
    """Oracle: the table of verbs, and the file system."""
    text = re.sub(r"^\s*#.*$", "", (ROOT / "speedrun.sh").read_text(), flags=re.MULTILINE)
    verbs = set(re.findall(r"(?:^|[ /])harness ([a-z]+)", text, flags=re.MULTILINE))
    assert verbs >= {"keys", "doctor", "prepare", "evaluate", "diff", "verify", "report", "lineage"}
    assert verbs <= set(VERBS)
    files = set(re.findall(r"(?:scripts|configs|recipes)/[\w./-]+", text))
    assert files
    assert [name for name in files if not (ROOT / name).is_file()] == []


def test_the_checkpoint_that_the_speedrun_damages_is_one_that_its_config_writes() -> None:
    """Oracle: `train.steps` and `checkpoint.every` ; the kill falls between two saves."""
    from harness import config

    text = (ROOT / "speedrun.sh").read_text()
    settings = config.load(ROOT / "configs" / "speedrun.yaml", []).settings
    damaged = int(re.findall(r"step-(\d{8})", text)[0])
    killed = int(re.findall(r"--step (\d+)", text)[0])
    assert damaged % settings.checkpoint.every == 0
    assert settings.checkpoint.every < killed < settings.train.steps - settings.checkpoint.every
    assert killed % settings.checkpoint.every != 0


def test_ci_runs_the_same_command_as_anybody() -> None:
    """Oracle: `.ci/run` has one command, and it is scripts/test.sh."""
    lines = [
        line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line and not line.startswith("#")
    ]
    assert len(lines) == 2
    assert lines[1].startswith("exec ")
    assert lines[1].endswith('scripts/test.sh"')


def test_the_last_thing_that_the_test_script_runs_is_pytest() -> None:
    """Oracle: CI judges by the closing line, which has to be pytest's."""
    assert (ROOT / "scripts" / "test.sh").read_text().splitlines()[-1].startswith("exec pytest ")


def test_setup_refuses_an_argument_that_it_does_not_know() -> None:
    """Oracle: exit code 2, usage on stderr, and nothing installed."""
    done = ran(ROOT / "scripts" / "setup.sh", "everything")
    assert done.returncode == 2
    assert "usage:" in done.stderr


@pytest.mark.parametrize("script", PYTHON, ids=lambda path: path.name)
def test_a_python_script_compiles_and_says_how_to_call_it(script: Path) -> None:
    """Oracle: the compiler; a docstring that names the script."""
    source = script.read_text(encoding="utf-8")
    compile(source, str(script), "exec")
    if "__main__" in source:
        assert f"python {script.relative_to(ROOT)}" in source


@pytest.mark.parametrize(("code", "expected"), [(0, 1), (1, 0), (2, 1)])
def test_must_fail_succeeds_only_for_the_exit_code_that_was_expected(code: int, expected: int) -> None:
    """Oracle: the shell's own `exit`."""
    assert ran(ROOT / "scripts" / "must_fail.sh", "1", "bash", "-c", f"exit {code}").returncode == expected


def test_flip_byte_changes_exactly_one_bit(tmp_path: Path) -> None:
    """Oracle: the bytes before; flipping twice restores them."""
    path = tmp_path / "file"
    before = bytes(range(256))
    path.write_bytes(before)
    ran(sys.executable, ROOT / "scripts" / "flip_byte.py", path)
    after = path.read_bytes()
    assert sum((a ^ b).bit_count() for a, b in zip(before, after, strict=True)) == 1
    ran(sys.executable, ROOT / "scripts" / "flip_byte.py", path)
    assert path.read_bytes() == before


# A parent that starts a child in a session of its own, as torchrun does; both would live for ten minutes.
_FAMILY = """
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
folder = pathlib.Path(sys.argv[1])
(folder / "child").write_text(str(child.pid))
(folder / "metrics.jsonl").write_text('{"step": 1}\\n{"step": 2}\\n{"step": 3')
time.sleep(600)
"""


def alive(pid: int) -> bool:
    """Whether process ``pid`` runs; a zombie does not."""
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


@pytest.mark.skipif(not shutil.which("bash") or not Path("/proc").is_dir(), reason="looks into /proc")
def test_kill_at_step_kills_children_in_other_sessions_too(tmp_path: Path) -> None:
    """Oracle: /proc, and that a partial last line does not count as a step; nobody waits for the end."""
    killer = [sys.executable, ROOT / "scripts" / "kill_at_step.py", tmp_path, "--step", "2", "--"]
    done = ran(*killer, sys.executable, "-c", _FAMILY, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "SIGKILL to 2 processes with step 2 on disk" in done.stdout
    assert not alive(int((tmp_path / "child").read_text()))


def test_kill_at_step_says_so_when_the_command_ends_first(tmp_path: Path) -> None:
    """Oracle: exit code 1."""
    killer = [sys.executable, ROOT / "scripts" / "kill_at_step.py", tmp_path, "--step", "2", "--"]
    done = ran(*killer, sys.executable, "-c", "pass")
    assert done.returncode == 1
    assert "ended before" in done.stderr


def test_kill_at_step_starts_nothing_when_the_step_is_there(tmp_path: Path) -> None:
    """Oracle: a command that would leave a file; a pipeline that goes on must not be killed again."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 2}\n')
    killer = [sys.executable, ROOT / "scripts" / "kill_at_step.py", tmp_path, "--step", "2", "--"]
    done = ran(*killer, "touch", tmp_path / "started")
    assert (done.returncode, "nothing to kill" in done.stdout) == (0, True)
    assert not (tmp_path / "started").exists()


def test_the_stages_that_the_pipeline_is_killed_in_are_those_of_speedrun_in_order() -> None:
    """Oracle: speedrun.sh itself; a stage whose command were renamed would never be found."""
    tree = ast.parse((ROOT / "scripts" / "bench" / "pipeline.py").read_text())
    (stages,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "STAGES"
    )
    commands = (ROOT / "speedrun.sh").read_text().replace('"${train[@]}"', "harness train")
    places = [commands.find(words) for words in stages.values()]
    assert places == sorted(places)
    assert min(places) > 0


@pytest.mark.parametrize("script", ["scripts/flip_byte.py", "examples/serving_gate.py"])
def test_a_script_without_its_arguments_says_which_it_takes(script: str, tmp_path: Path) -> None:
    """Oracle: exit code 2 and one line."""
    done = ran(sys.executable, ROOT / script, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(f"usage: python {script} ")
