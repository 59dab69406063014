"""Run a training command and SIGKILL it, with every process it started, in the middle.

python scripts/kill_at_step.py RUN --step 60 -- torchrun --nproc-per-node 2 -m harness train CONFIG

Watches RUN/metrics.jsonl and kills as soon as it holds the step; `--after SECONDS` kills by the clock.
Exit code 0: killed, or the step was there before, and nothing was started. 1: the command ended first.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

POLL_SECONDS = 0.02


def last_step(metrics: Path) -> int:
    """The step of the last whole line of ``metrics``; 0 when there is none."""
    if not metrics.exists():
        return 0
    with open(metrics, "rb") as stream:
        stream.seek(0, 2)
        stream.seek(max(0, stream.tell() - 8192))
        lines = stream.read().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith(b"\n")]
    return int(json.loads(whole[-1])["step"]) if whole else 0


def kill_tree(root: int) -> int:
    """SIGKILL process ``root`` and all its descendants; returns how many.

    torchrun puts each worker into a session of its own, so killing a process group would leave them alive.
    Everything is stopped first: a process that is about to start another cannot.
    """
    stopped: dict[int, psutil.Process] = {}
    try:
        found = [psutil.Process(root)]
    except psutil.NoSuchProcess:
        return 0
    while found:
        for process in found:
            _send(process, signal.SIGSTOP)
            stopped[process.pid] = process
        children = [child for process in stopped.values() for child in _children(process)]
        found = [child for child in children if child.pid not in stopped]
    for process in stopped.values():
        _send(process, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while any(_alive(process) for process in stopped.values()) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return len(stopped)


def _send(process: psutil.Process, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children())
    except psutil.NoSuchProcess:
        return []


def _alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def run_and_kill(command: Sequence[str], run: Path, *, step: int | None, after: float | None) -> str | None:
    """Start ``command`` and kill it at ``step`` or ``after`` seconds; says what it did, or None."""
    started = time.monotonic()
    with subprocess.Popen(command, start_new_session=True) as process:
        try:
            while process.poll() is None:
                reached = last_step(run / "metrics.jsonl") if step is not None else 0
                seconds = time.monotonic() - started
                if (step is not None and reached >= step) or (after is not None and seconds >= after):
                    count = kill_tree(process.pid)
                    when = f"with step {reached} on disk" if step is not None else f"after {seconds:.1f} s"
                    return f"SIGKILL to {count} processes {when}"
                time.sleep(POLL_SECONDS)
        except BaseException:
            kill_tree(process.pid)
            raise
    return None


def main() -> int:
    """Parse, run, kill, say so."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN")
    when = parser.add_mutually_exclusive_group(required=True)
    when.add_argument("--step", type=int)
    when.add_argument("--after", type=float, metavar="SECONDS")
    parser.add_argument("command", nargs="+", metavar="COMMAND")
    arguments = parser.parse_args()
    if arguments.step is not None and last_step(arguments.run / "metrics.jsonl") >= arguments.step:
        print(f"kill_at_step: step {arguments.step} is on disk already, nothing to kill")
        return 0
    done = run_and_kill(arguments.command, arguments.run, step=arguments.step, after=arguments.after)
    if done is None:
        print("kill_at_step: the command ended before it could be killed", file=sys.stderr)
        return 1
    print(f"kill_at_step: {done}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
