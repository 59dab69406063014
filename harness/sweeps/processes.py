"""The members of a sweep as processes of this machine: some at a time, each started again when it was killed.

A member is `harness train`, alone or under torchrun, with what it prints in ``console.log`` of its folder. A
sweep that is stopped stops its members, which save; started again, each member continues by itself.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import signals
from harness.errors import Interrupted
from harness.format.json_lines import Tail
from harness.sweeps.members import Member, reached
from harness.terminal import Progress

CONSOLE = "console.log"
_POLL_SECONDS = 0.2
_INTERRUPTED = 75


@dataclass(frozen=True)
class Job:
    """A member and how to start it."""

    member: Member
    command: tuple[str, ...]
    steps: int
    """Of the whole run."""


@dataclass(frozen=True)
class Ended:
    """How a member came out."""

    member: Member
    attempts: int
    """Processes started by this launch; 0 when it was complete before."""
    failure: str | None
    """Why it is not complete; None when it is."""


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    attempts: int
    began_at: int
    """Step of the newest checkpoint when it was started."""
    metrics: Tail
    step: int = 0
    told: bool = False
    """Whether it was asked to stop."""


def command(config: Path, member: Member, processes: int) -> tuple[str, ...]:
    """What starts ``member``: alone, or as ``processes`` ranks under torchrun."""
    launcher: tuple[str, ...] = (sys.executable,)
    if processes > 1:
        launcher += ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}")
    return (*launcher, "-m", "harness", "train", str(config), *member.overrides)


def run(
    jobs: Sequence[Job], *, at_once: int, attempts: int, say: Callable[[str], None], bar: Progress
) -> list[Ended]:
    """Bring every job to its end, ``at_once`` at a time, and say how each came out, in the order given.

    A member that was killed or interrupted, or under torchrun got further than before, is started again, at
    most ``attempts`` times in all; any other failure is final. Raises `Interrupted` after a stop signal, when
    every member has saved.
    """
    waiting, ended, running = deque(jobs), dict[str, Ended](), list[_Running]()
    with signals.listening() as stop:
        while waiting or running:
            while waiting and len(running) < at_once and not stop.signal:
                job = waiting.popleft()
                if reached(job.member) >= job.steps:
                    ended[job.member.name] = Ended(job.member, 0, None)
                    bar.advance(job.steps)
                    say(f"{job.member.name}: complete before")
                else:
                    running.append(_start(job, 1))
            for one in list(running):
                _follow(one, bar)
                if one.process.poll() is not None:
                    running.remove(one)
                    again = None if stop.signal else _judge(one, attempts, ended, say)
                    running += [again] if again else []
                elif stop.signal and not one.told:
                    one.process.send_signal(signal.SIGTERM)
                    one.told = True
            if stop.signal and not running:
                raise Interrupted(
                    f"{signals.name_of(stop.signal)}: {len(ended)} of {len(jobs)} members are done, "
                    "those that ran have saved",
                    remedy="restart with the same command",
                )
            time.sleep(_POLL_SECONDS)
    return [ended[job.member.name] for job in jobs]


def _start(job: Job, attempts: int) -> _Running:
    folder = job.member.folder
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / CONSOLE, "ab") as console:
        process = subprocess.Popen(
            job.command,
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=subprocess.STDOUT,
            # A terminal's Ctrl-C is passed on by `run`, once.
            start_new_session=True,
            preexec_fn=signals.follow(os.getpid()),
        )
    return _Running(job, process, attempts, reached(job.member), Tail(folder / "metrics.jsonl"))


def _follow(one: _Running, bar: Progress) -> None:
    lines = one.metrics.read().lines
    step = lines[-1].get("step") if lines else None
    if isinstance(step, int) and step > one.step:
        bar.advance(step - one.step)
        one.step = step


def _judge(
    one: _Running, attempts: int, ended: dict[str, Ended], say: Callable[[str], None]
) -> _Running | None:
    """The next attempt of a member whose process has ended; None when it is done or has failed."""
    member, code = one.job.member, one.process.returncode
    if code == 0:
        ended[member.name] = Ended(member, one.attempts, None)
        say(f"{member.name}: complete")
        return None
    how = f"killed by {signals.name_of(-code)}" if code < 0 else f"exit code {code}"
    # torchrun leaves with 1 whatever its workers say; what got further is not stuck.
    masked = "torch.distributed.run" in one.job.command
    passing = code < 0 or code == _INTERRUPTED or (masked and reached(member) > one.began_at)
    if passing and one.attempts < attempts:
        say(f"{member.name}: {how}; started again")
        return _start(one.job, one.attempts + 1)
    reason = f"{how}: {last_error(member.folder / CONSOLE)}"
    ended[member.name] = Ended(member, one.attempts, reason)
    say(f"{member.name}: {reason}")
    return None


def last_error(console: Path) -> str:
    """The last line of the harness in what a member has printed, else the last line of all."""
    with open(console, "rb") as stream:
        stream.seek(max(0, console.stat().st_size - (64 << 10)))
        lines = stream.read().decode("utf-8", "replace").split("\n")
    own = [line for line in lines if line.startswith("harness: ")]
    shown = (own or [line for line in lines if line.strip()] or ["it printed nothing"])[-1]
    return "".join(letter for letter in shown.removeprefix("harness: ") if letter.isprintable())[:400]
