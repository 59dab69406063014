"""Auditing a run while a job goes on with it: what the job does is never held against the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import run_folder
from run_folder import SampleRun

from harness.audit.folders import opening, payload
from harness.audit.verification import gate
from harness.cli import main
from harness.provenance.transparency import log


@pytest.fixture
def run(tmp_path: Path) -> SampleRun:
    """Three checkpoints, all with payload."""
    made = SampleRun(tmp_path / "run", run_folder.identity(tmp_path / "me"))
    made.advance(10, 20, 30)
    return made


def audited(verb: str, path: Path, run: SampleRun) -> int:
    """The exit code of a verb with the run's keys."""
    keys = [str(run.root.parent / f"me.{kind}.pub") for kind in ("ed25519", "p256")]
    return main([verb, str(path), *(["--out", str(run.root.parent / "out")] if verb == "report" else []),
                 "--key", *keys])  # fmt: skip


def at(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, job: Callable[[], object], times: int = 1
) -> None:
    """Let ``job`` do its work each of the first ``times`` times that an audit comes to a place."""
    whole, left = getattr(module, name), [job] * times

    def disturbed(*words: Any, **options: Any) -> Any:
        if left:
            left.pop()()
        return whole(*words, **options)

    monkeypatch.setattr(module, name, disturbed)


@pytest.mark.parametrize("verb", ["verify", "report", "lineage", "gate"])
def test_what_a_job_prunes_or_adds_meanwhile_is_no_failure(
    verb: str, run: SampleRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the exit code of the run as it is before and after. Two checkpoints come after the log was
    read, and one loses its payload before it is hashed, or before its statement is read."""
    claimed = log.read_claimed

    def read(folder: Path) -> log.Log:
        monkeypatch.setattr(log, "read_claimed", claimed)
        book = claimed(folder)
        run.advance(40, 50)
        return book

    monkeypatch.setattr(log, "read_claimed", read)
    at(monkeypatch, payload, "check", lambda: run.prune(10))
    assert audited(verb, run.root, run) == 0
    at(monkeypatch, opening, "examine_folder", lambda: run.prune(20))
    assert audited(verb, run.root, run) == 0
    assert audited("verify", run.root, run) == 0


def test_a_run_that_changes_faster_than_it_is_read_is_no_bad_one(
    run: SampleRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: exit code 4 and one line; 0 as soon as it is quiet."""
    steps = iter(range(40, 1000, 10))

    def job() -> None:
        run.prune(int(run.folder.complete()[0].name[-8:]))
        run.advance(next(steps))

    at(monkeypatch, payload, "check", job, 5)
    assert audited("verify", run.root, run) == 4
    said = capsys.readouterr()
    assert (said.out, len(said.err.splitlines())) == ("", 1)
    assert "a job has changed it during each of 5 readings" in said.err
    assert audited("verify", run.root, run) == 0


def test_a_gate_does_not_read_on_for_as_long_as_a_job_changes_the_run(
    run: SampleRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: exit code 4 while each look for loose weights sees another run, 0 when it is quiet, and 1 when
    the same weights are loose each time."""
    steps = iter(range(40, 1000, 10))

    def look(at_work: int) -> int:
        with monkeypatch.context() as patched:
            at(patched, gate, "_loose", lambda: run.advance(next(steps)), at_work)
            return audited("gate", run.root, run)

    assert look(6) == 4
    assert "cannot tell" in (said := capsys.readouterr().out)
    assert "a job has changed it during each of 5 readings" in said
    assert look(0) == 0
    (run.root / "events").mkdir(exist_ok=True)
    (run.root / "events" / "loose.pt").write_bytes(b"x")
    assert look(6) == 1
    assert "loose.pt" in capsys.readouterr().out


def test_a_job_hides_no_damage(
    run: SampleRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the damaged file is named, exit code 1, though each reading finds other things as well."""
    weights = run.saved[30].folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    steps = iter(range(40, 1000, 10))
    at(monkeypatch, payload, "check", lambda: run.advance(next(steps)), 5)
    assert audited("verify", run.root, run) == 1
    assert str(weights) in capsys.readouterr().out


def test_a_checkpoint_that_is_removed_while_it_is_read_is_not_called_damaged(
    run: SampleRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: exit code 4 and the reason."""
    at(monkeypatch, payload, "check", lambda: run.prune(10))
    assert audited("verify", run.saved[10].folder, run) == 4
    assert "was removed while it was read, by checkpoint.keep" in capsys.readouterr().err
