"""Processes of the training half that begin as forks of one that has imported it: `started`.

Importing torch and accelerate takes three seconds of a core, more than a toy run itself. A fork leaves that
out and nothing else: session, folder, variables and streams are its own, its parent is the test, no thread
has run and nothing been drawn before it. What is read once, at import, decides which server forks. One thing
differs: the forks of a server iterate over sets of strings in the same order, so tests of resumes that are
about nothing else start some processes afresh (`conftest.Place.start`), as `pytest --fresh` starts all.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, NoReturn

import ranks

possible = sys.platform == "linux" and not Path("/dev/nvidiactl").exists()
"""CUDA cannot be used in a fork once a library has asked whether there is any."""

_OF_ONE = ("harness.commands.train", "harness.training.loop", "harness.training.ranks.failure")
_OF_SEVERAL = (*_OF_ONE, "torch._dynamo", "torch.distributed.fsdp")
"""Modules that every run of one rank imports, and every rank of several."""
_READ_LATE = ("HOME", "XDG_CONFIG", "PYTEST", "AWS_", "HARNESS_", "WANDB_", "DIARY", "PLANTED", "SLOW_STORE")
"""Beginnings of variables that no import reads."""
_PR_SET_NAME, _PR_SET_CHILD_SUBREAPER = 15, 36  # linux/prctl.h
_LARGEST_REQUEST = 1 << 17


class Forked:
    """What tests use of `subprocess.Popen`, for a child that was not started by it."""

    def __init__(self, command: Sequence[str], pid: int, streams: Sequence[IO[str]] = ()) -> None:
        self.args, self.pid = command, pid
        self.returncode: int | None = None
        self._streams = streams

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float = float("inf")) -> int:
        """The exit code, once there is one."""
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(list(self.args), timeout)
            time.sleep(0.005)
        return code

    def communicate(self, timeout: float = float("inf")) -> tuple[str, str]:
        """What it wrote to stdout and stderr, once it has ended."""
        self.wait(timeout)
        for stream in self._streams:
            stream.seek(0)
        out, err = (stream.read() for stream in self._streams)
        return out, err

    def send_signal(self, number: int) -> None:
        """Unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


def started(command: Sequence[str], folder: Path, environ: Mapping[str, str]) -> Forked:
    """``command`` in ``folder``: `PYTHON -m MODULE …`, or that or `PYTHON FILE` after `PYTHON ranks.py N`."""
    early = {name: value for name, value in environ.items() if not name.startswith(_READ_LATE)}
    server = _server(tuple(sorted(early.items())), _OF_ONE if command[1] == "-m" else _OF_SEVERAL)
    # Files, since a pipe needs somebody who reads it meanwhile.
    streams = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115
    request = json.dumps([list(command), str(folder), dict(environ)]).encode()
    _adopt(True)
    try:
        socket.send_fds(server, [request], [stream.fileno() for stream in streams])
        answer = server.recv(64)
    finally:
        _adopt(False)
    if not answer:
        raise RuntimeError("the fork server has ended")
    return Forked(command, int(answer), streams)


def _adopt(orphans: bool) -> None:
    """Become the parent of descendants whose parent ends, as that of every fork does, or no longer."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(orphans), 0, 0, 0)


@functools.lru_cache(maxsize=4)
def _server(environ: tuple[tuple[str, str], ...], modules: tuple[str, ...]) -> socket.socket:
    """A server that has these variables and modules; it ends when nobody holds its socket's other end."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with its:
        subprocess.Popen(
            [sys.executable, __file__, str(its.fileno()), *modules],
            env=dict(environ),
            pass_fds=[its.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
    ours.recv(64)  # it has imported everything
    return ours


def _serve(requests: socket.socket, modules: Sequence[str]) -> list[str]:
    """Fork once for every request; returns, in each fork, the command that it is to be."""
    for name in modules:
        importlib.import_module(name)
    if len(os.listdir("/proc/self/task")) > 1:
        raise RuntimeError("an import has started a thread, which no fork would have")
    gc.freeze()
    requests.send(b"ready")
    while True:
        request, descriptors, _, _ = socket.recv_fds(requests, _LARGEST_REQUEST, 2)
        if not request:
            sys.exit()
        if os.fork() == 0:
            break
        os.wait()
        for descriptor in descriptors:
            os.close(descriptor)
    between = os.getpid()
    if os.fork():
        os._exit(0)
    while os.getppid() == between:
        time.sleep(0.001)
    requests.send(str(os.getpid()).encode())
    requests.close()
    os.setsid()
    for descriptor, target in zip(descriptors, (1, 2), strict=True):
        os.dup2(descriptor, target)
        os.close(descriptor)
    command, folder, environ = json.loads(request)
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(folder)
    return list(command)


def rank(command: Sequence[str], environ: Mapping[str, str]) -> Forked:
    """A fork of this process that goes on as ``command``; psutil knows it as ``rank-N``."""
    pid = os.fork()
    if pid:
        return Forked(command, pid)
    os.environ.update(environ)
    ctypes.CDLL(None).prctl(_PR_SET_NAME, f"rank-{environ['RANK']}".encode(), 0, 0, 0)
    _become(command)


def _become(command: Sequence[str]) -> NoReturn:
    """Run ``command`` as the interpreter does when it is started with it; ends with the process."""
    sys.orig_argv = list(command)
    if command[1].endswith("ranks.py"):
        sys.exit(ranks.main(command[2:], rank))
    if command[1] == "-m":
        sys.path[0] = os.getcwd()
        sys.argv = list(command[2:])
        runpy.run_module(command[2], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(command[1:])
        runpy.run_path(command[1], run_name="__main__")
    sys.exit()


if __name__ == "__main__":
    _become(_serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:]))
