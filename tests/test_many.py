"""Checkpoints examined by several processes (`harness.audit.verification.many`), as one process does it."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import run_folder
from attack import flip, trusted

from harness.audit.folders import opening
from harness.audit.verification import many, verify
from harness.cli import main
from harness.errors import EnvironmentFault
from harness.format.manifest import Manifest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks on Linux only")


@pytest.fixture
def forking(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A few folders are worth two processes; holds the number of processes of each call."""
    monkeypatch.setattr(many, "_WORTH_IT", 2)
    monkeypatch.setattr(many, "_AT_ONCE", 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    # Threads that other tests have left behind in this process wait for nothing.
    before = threading.active_count()
    monkeypatch.setattr(threading, "active_count", lambda: len(threading.enumerate()) - before + 1)
    calls: list[int] = []
    start = many._in_processes

    def counted(task: Any, processes: int) -> Any:
        calls.append(processes)
        return start(task, processes)

    monkeypatch.setattr(many, "_in_processes", counted)
    return calls


def document(root: Path, signer: Any) -> dict[str, Any]:
    """The report without its duration."""
    found = verify.verify(root, trusted(signer), quiet=True).document()
    return {name: value for name, value in found.items() if name != "seconds"}


@pytest.mark.parametrize("damaged", [False, True])
def test_several_processes_find_what_one_finds(tmp_path: Path, forking: list[int], damaged: bool) -> None:
    """Oracle: the report of one process, findings in order; pruned and damaged ones among them."""
    signer = run_folder.identity(tmp_path / "me")
    root = run_folder.build(tmp_path / "run", signer, steps=range(10, 90, 10), pruned=(10, 40))
    if damaged:
        flip(run_folder.checkpoint(root, 20) / "provenance" / "slsa.sigstore.json", 300)
        (run_folder.checkpoint(root, 30) / "more").write_bytes(b"")
        flip(run_folder.checkpoint(root, 70) / "model.safetensors", -1)
        (run_folder.checkpoint(root, 80) / "MANIFEST.json").unlink()
    several = document(root, signer)
    assert forking == [2]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(many, "_may_fork", lambda: False)
        one = document(root, signer)
    assert forking == [2]
    assert several == one
    assert several["verdict"] == ("FAILED" if damaged else "verified")


def test_what_the_processes_have_parsed_is_not_parsed_again(tmp_path: Path, forking: list[int]) -> None:
    """Oracle: the report of one process; a parser that fails once the checkpoints are examined."""
    signer = run_folder.identity(tmp_path / "me")
    root = run_folder.build(tmp_path / "run", signer, steps=range(10, 70, 10), pruned=(10, 20))
    report = verify.verify(root, trusted(signer), quiet=True)
    assert forking == [2]
    with pytest.MonkeyPatch.context() as patched:
        patched.delattr(Manifest, "parse")
        several = report.document()["checkpoints"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(many, "_may_fork", lambda: False)
        assert document(root, signer)["checkpoints"] == several


def test_a_disk_that_fails_in_a_process_is_told(
    tmp_path: Path, forking: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the fault that `examine_folder` raises for one of the folders, with its place."""
    signer = run_folder.identity(tmp_path / "me")
    root = run_folder.build(tmp_path / "run", signer, steps=range(10, 70, 10))
    read = opening._read

    def failing(folder: Path, *words: Any) -> Any:
        if folder.name.endswith("40"):
            raise OSError(5, "Input/output error", str(folder))
        return read(folder, *words)

    monkeypatch.setattr(opening, "_read", failing)
    with pytest.raises(EnvironmentFault, match=r"Input/output error.*step-00000040; check the disk"):
        verify.verify(root, trusted(signer), quiet=True)
    assert forking == [2]


def ignores(pid: int, number: int) -> bool:
    """Whether the process ``pid`` ignores the signal, as /proc says."""
    (mask,) = re.findall(r"SigIgn:\s*([0-9a-f]+)", Path(f"/proc/{pid}/status").read_text())
    return bool(int(mask, 16) >> (number - 1) & 1)


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGINT, 130, "harness: stopped by the keyboard"),
        (signal.SIGKILL, 3, "harness: a process that verifies died; look for the out-of-memory killer"),
    ],
    ids=["ctrl-c", "killed"],
)
def test_what_ends_a_process_is_told_in_one_line(
    number: int,
    code: int,
    said: str,
    tmp_path: Path,
    forking: list[int],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Oracle: the exit codes of DESIGN.md section 2; a terminal sends Ctrl-C to every process."""
    signer = run_folder.identity(tmp_path / "me")
    root = run_folder.build(tmp_path / "run", signer, steps=range(10, 70, 10))
    keys = [str(tmp_path / f"me.{each}.pub") for each in ("ed25519", "p256")]
    me, read = os.getpid(), opening._read
    others = {each.pid for each in psutil.Process(me).children()}  # servers of other tests

    def ended(folder: Path, *words: Any) -> Any:
        if folder.name.endswith("60") and os.getpid() != me:
            every = {me, *(each.pid for each in psutil.Process(me).children())} - others
            while not all(ignores(pid, signal.SIGINT) for pid in every - {me}):
                time.sleep(0.005)  # a process that has not begun would end by it, and say so
            for pid in every if number == signal.SIGINT else [os.getpid()]:
                os.kill(pid, number)
        return read(folder, *words)

    monkeypatch.setattr(opening, "_read", ended)
    assert main(["verify", str(root), "--key", *keys]) == code
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(said)
    assert forking == [2]


def test_a_process_with_other_threads_is_not_forked(tmp_path: Path, forking: list[int]) -> None:
    """Oracle: a lock that another thread holds would stay locked in a fork, so there is none."""
    signer = run_folder.identity(tmp_path / "me")
    root = run_folder.build(tmp_path / "run", signer, steps=range(10, 70, 10))
    done = threading.Event()
    other = threading.Thread(target=done.wait)
    other.start()
    try:
        assert document(root, signer)["verdict"] == "verified"
    finally:
        done.set()
        other.join()
    assert forking == []
