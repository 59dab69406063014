"""The front door for tests: real processes, each with its own key and home."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import fork_server
import orjson
import psutil
import pytest
from hypothesis import HealthCheck, settings
from kill_at_step import kill_tree

from harness.training.step import compiler

if TYPE_CHECKING:
    from object_store import Bucket, Server

# A machine that others use too can take 200 ms for anything.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

TESTS = Path(__file__).parent
TIMEOUT = 240
"""Seconds after which a process that hangs fails its test."""
FORKED = {"train", "evaluate", "prepare"}
"""Verbs that import packages of the training half."""
Process = subprocess.Popen[str] | fork_server.Forked


def pytest_addoption(parser: pytest.Parser) -> None:
    """`pytest --fresh`."""
    parser.addoption("--fresh", action="store_true", help="no process is a fork of tests/fork_server.py")


def pytest_configure(config: pytest.Config) -> None:
    """Obey the option. Processes hear Ctrl-C also where a shell started the tests in the background, which
    would be inherited."""
    fork_server.possible &= not config.getoption("--fresh")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass(frozen=True)
class Finished:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def last_line(self) -> str:
        """The last line on the screen."""
        return (self.out + self.err).strip().splitlines()[-1]


class Place:
    """A folder with a home, a signing key made at first use, and the toy task."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.run = root / "run"
        shutil.copy(TESTS / "toy_task.py", root / "toy_task.py")
        self.environ = {
            **{
                name: value for name, value in os.environ.items() if not name.startswith(("HARNESS", "WANDB"))
            },
            "HOME": str(root),
            "XDG_CONFIG_HOME": str(root / "config"),
            "XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache")),
            "OMP_NUM_THREADS": "1",
        }

    def write(self, name: str, text: str) -> Path:
        """Write a config file."""
        path = self.root / name
        path.write_text(text)
        return path

    def start(
        self,
        words: Sequence[str],
        processes: int = 1,
        environ: Mapping[str, str] | None = None,
        *,
        torchrun: Sequence[str] | None = None,
        fresh: bool = False,
    ) -> Process:
        """`harness WORDS` in a process group of its own; several processes by ``ranks.py``, or, where options
        for it are given, by torchrun. Training is a fork of `fork_server`, unless torchrun starts it or it is
        to be ``fresh``."""
        command = [sys.executable, "-m", "harness", *words]
        if torchrun is not None:
            options = ["--standalone", f"--nproc-per-node={processes}", *torchrun]
            command = [sys.executable, "-m", "torch.distributed.run", *options, "-m", "harness", *words]
        elif processes > 1:
            command = [sys.executable, str(TESTS / "ranks.py"), str(processes), *command]
        fork = words[0] in FORKED and torchrun is None and not fresh
        return launched(command, self.root, {**self.environ, **(environ or {})}, fork=fork)

    def harness(
        self,
        *words: str,
        processes: int = 1,
        environ: Mapping[str, str] | None = None,
        torchrun: Sequence[str] | None = None,
        fresh: bool = False,
    ) -> Finished:
        """Run `harness WORDS` to its end."""
        return finish(self.start(words, processes, environ, torchrun=torchrun, fresh=fresh))

    def steps(self) -> list[int]:
        """The steps in metrics.jsonl."""
        path = self.run / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        return [orjson.loads(line)["step"] for line in lines if line.endswith(b"\n")]

    def hold(self, name: str) -> None:
        """Let every step of the toy task wait from the moment at which the run folder has a file ``name``,
        until `go_on`: what a test does at that point then never comes too late, however slow it is."""
        new = self.root / "hold.new"
        new.write_text(str(self.run / name))
        new.replace(self.root / "hold")

    def go_on(self) -> None:
        """Let the steps that `hold` has stopped go on."""
        (self.root / "hold").unlink(missing_ok=True)

    def wait_for(self, process: Process, pattern: str) -> Path:
        """Until the run folder has a file that matches ``pattern``."""
        deadline = time.monotonic() + TIMEOUT
        while time.monotonic() < deadline:
            found = sorted(self.run.glob(pattern))
            if found:
                return found[-1]
            if process.poll() is not None:
                pytest.fail(f"ended before {pattern} appeared: {process.communicate()}")
            time.sleep(0.01)
        pytest.fail(f"{pattern} did not appear")

    def kill_at(self, process: Process, pattern: str) -> None:
        """SIGKILL the process and all its descendants once ``pattern`` appears."""
        self.wait_for(process, pattern)
        kill_tree(process.pid)
        process.communicate()

    def start_and_kill(
        self,
        name: str,
        words: Sequence[str],
        processes: int = 1,
        environ: Mapping[str, str] | None = None,
        *,
        torchrun: Sequence[str] | None = None,
        fresh: bool = False,
    ) -> None:
        """`start`, then SIGKILL to it and all its descendants within the steps after the run folder has got a
        file ``name``; the toy task makes none until then (`hold`)."""
        self.hold(name)
        self.kill_at(self.start(words, processes, environ, torchrun=torchrun, fresh=fresh), name)
        self.go_on()


def launched(command: Sequence[str], folder: Path, environ: Mapping[str, str], *, fork: bool) -> Process:
    """``command`` in ``folder`` with these variables only, and in a process group of its own."""
    if fork and fork_server.possible:
        return fork_server.started(command, folder, environ)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environ, start_new_session=True, **streams)


def finish(process: Process) -> Finished:
    """Wait for ``process`` and collect what it said."""
    try:
        out, err = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        kill_tree(process.pid)
        out, err = process.communicate()
        pytest.fail(f"hangs: {out[-2000:]}{err[-2000:]}")
    return Finished(process.returncode, out, err)


def stop_rank(stopped: psutil.Process, other: psutil.Process, launch: Process) -> Finished:
    """Stop a rank as a host without power is stopped: no connection closes. The end of the launch, which
    must come without that rank."""
    stopped.send_signal(signal.SIGSTOP)
    assert psutil.wait_procs([other], timeout=TIMEOUT)[0], "the other rank hangs as well"
    stopped.kill()
    return finish(launch)


needs_compiler = pytest.mark.skipif(compiler.lack() is not None, reason=f"{compiler.lack()}")
"""Of a test whose model is compiled."""


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A fresh `Place`."""
    return Place(tmp_path)


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """One S3 server for all tests of a process that want one."""
    from object_store import Server

    running = Server()
    yield running
    running.stop()


@pytest.fixture
def bucket(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bucket:
    """A bucket of the test's own; this process, and a `Place` that is made after it, find the server."""
    from object_store import bucket_of

    for name, value in server.environ.items():
        monkeypatch.setenv(name, value)
    return bucket_of(server, f"b-{hashlib.sha256(str(tmp_path).encode()).hexdigest()[:20]}")
