"""A live view of a run from the files in its folder, from another terminal or host.

Repaints once a second until the run is finished or Ctrl-C. Prints one frame and leaves with --once, with
--json, or when stdout is not a terminal.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from harness.commands import Outcome
from harness.errors import UsageError
from harness.format import files
from harness.format.json_lines import Line, Tail
from harness.format.layout import RunFolder, step_of
from harness.report import facts, frame, runs
from harness.report.frame import View
from harness.report.runs import Incident

EXAMPLE = "harness watch runs/tiny --once"

_CLEAR_REST = "\x1b[K"
_WIDEST = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run and how often to look."""
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--once", action="store_true", help="print one frame and leave")
    parser.add_argument(
        "--every", type=float, default=1.0, metavar="SECONDS", help="between looks (default 1)"
    )


def run(arguments: argparse.Namespace) -> Outcome:
    """Follow the files of the run."""
    if not arguments.run.is_dir():
        raise UsageError("no such run folder", where=str(arguments.run), remedy="check the path")
    if not (math.isfinite(arguments.every) and arguments.every > 0):
        raise UsageError(f"--every {arguments.every} is not a positive number of seconds")
    folder = RunFolder(arguments.run)
    paths = [folder.metrics, folder.run_config, folder.checkpoints]
    if not any(map(os.path.lexists, paths)) and not list(runs.event_files(arguments.run)):
        remedy = "check the path, or wait until the run has begun"
        raise UsageError("holds nothing of a run", where=str(arguments.run), remedy=remedy)
    follower = Follower(arguments.run)
    view = follower.look(time.time())
    if arguments.once or arguments.json or not sys.stdout.isatty():
        return Outcome(_document(view), "\n".join(frame.draw(view, _WIDEST)))
    try:
        _repaint(follower, view, arguments.every)
    except KeyboardInterrupt:
        print()
    return Outcome(_document(follower.look(time.time())), "")


class Follower:
    """Reads what was added to a run's files since the last look."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._folder = RunFolder(root)
        self._metrics = Tail(self._folder.metrics)
        self._events: dict[int, Tail] = {}
        self._lines: list[Line] = []
        self._unreadable = 0
        self._incidents: list[Incident] = []

    def look(self, now: float) -> View:
        """The run as it is at Unix time ``now``."""
        chunk = self._metrics.read()
        if chunk.restarted:
            self._lines.clear()
            self._unreadable = 0
        self._unreadable += chunk.unreadable
        self._lines += runs.step_lines(chunk.lines)
        for rank, path in runs.event_files(self._root):
            tail = self._events.setdefault(rank, Tail(path))
            self._incidents += runs.incidents((rank, line) for line in tail.read().lines)
        self._incidents.sort(key=lambda one: one.time)
        complete = self._folder.complete()
        return View(
            name=files.real(self._root).name,
            planned=facts.planned_steps(runs.config_text(self._root), str(self._folder.run_config)),
            lines=self._lines,
            unreadable=self._unreadable,
            checkpoint=_newest(complete),
            checkpoints=len(complete),
            incidents=self._incidents,
            now=now,
        )


def _newest(complete: list[Path]) -> tuple[int, float] | None:
    """Step and time of the last of ``complete``; None when there is none, or when it was just pruned."""
    for path in reversed(complete):
        try:
            return step_of(path.name), path.stat().st_mtime
        except OSError:  # also where it is no folder but a link that leads nowhere
            continue
    return None


def _repaint(follower: Follower, view: View, every: float) -> None:
    """Draw over the last frame until the run has finished."""
    height = 0
    while True:
        width = min(shutil.get_terminal_size().columns, _WIDEST)
        lines = frame.draw(view, width)
        up = f"\x1b[{height}A" if height else ""
        blank = [""] * (height - len(lines))
        sys.stdout.write(up + "".join(f"{line}{_CLEAR_REST}\n" for line in [*lines, *blank]))
        sys.stdout.flush()
        height = max(height, len(lines))
        if view.planned is not None and view.lines and int(view.lines[-1]["step"]) >= view.planned:
            return
        time.sleep(every)
        view = follower.look(time.time())


def _document(view: View) -> dict[str, Any]:
    last = dict(view.lines[-1]) if view.lines else None
    return {
        "run": view.name,
        "planned": view.planned,
        "last": last,
        "unreadable": view.unreadable,
        "seconds_a_step": frame.seconds_a_step(view.lines),
        "checkpoint": None if view.checkpoint is None else view.checkpoint[0],
        "checkpoints": view.checkpoints,
        "incidents": [one.text for one in view.incidents[-3:]],
    }
