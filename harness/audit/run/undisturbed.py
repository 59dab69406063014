"""Reading a run folder that a job writes to meanwhile: what it does is no fault of the run.

A job adds checkpoints and records of the log, and `checkpoint.keep` renames folders and removes payload. So
what was found wrong counts only if nothing has changed there since the reading began, or if the next reading
finds it too. Nothing is locked: an auditor may read only, and must never keep a job from its folder.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import TypeVar

from harness.errors import EvidenceIncomplete, HarnessError
from harness.format import layout
from harness.format.layout import RunFolder
from harness.provenance.findings import Finding
from harness.provenance.transparency import log

T = TypeVar("T")
_READINGS = 5
_ENTRY_SECONDS = 0.5
"""In which a checkpoint that was just renamed is in the log, if a job is at work."""


def read(path: Path, attempt: Callable[[], T], failures: Callable[[T], Iterable[Hashable]]) -> T:
    """What ``attempt`` makes of ``path``, a run folder or a checkpoint folder; ``failures``: what it found.

    Raises what ``attempt`` raises, and `EvidenceIncomplete` when it is another failure each time, since the
    folder changes, or when the checkpoint is removed meanwhile.
    """
    earlier: set[Hashable] = set()
    for _ in range(_READINGS):
        before = _state(path)
        found, result = _made(attempt, failures)
        if any(isinstance(each, Finding) and each.check == "log" and each.missing for each in found):
            time.sleep(_ENTRY_SECONDS)
        if found <= earlier or _state(path) == before:
            return result()
        if not path.exists():
            what = "was removed while it was read, by checkpoint.keep of a job that is at work in its run"
            raise EvidenceIncomplete(what, where=str(path), remedy="choose a newer checkpoint")
        lasting, earlier = earlier & found, found
    if lasting:
        return result()
    what = f"a job has changed it during each of {_READINGS} readings"
    raise EvidenceIncomplete(
        what, where=str(path), remedy="wait for the job, or read a copy or one checkpoint"
    )


def _made(
    attempt: Callable[[], T], failures: Callable[[T], Iterable[Hashable]]
) -> tuple[set[Hashable], Callable[[], T]]:
    """What ``attempt`` fails of, and what returns or raises what it came to."""
    try:
        made = attempt()
    except HarnessError as error:
        raised = error

        def again() -> T:
            raise raised

        return {str(raised)}, again
    return set(failures(made)), lambda: made


def _state(path: Path) -> Hashable:
    """What a job changes: the head of the log, names of checkpoints, and the entries of one that it prunes.

    It never changes an entry of a whole one, so whoever does is found out.
    """
    run = RunFolder(path)
    try:
        with os.scandir(run.checkpoints) as entries:
            folders = frozenset((each.name, _pruned_at(each)) for each in entries if _is_shown(each.name))
    except OSError:
        folders = frozenset()
    try:
        head = os.stat(run.log / log.HEAD)
    except OSError:
        return os.path.lexists(path), None, folders
    return os.path.lexists(path), (head.st_ino, head.st_mtime_ns), folders


def _is_shown(name: str) -> bool:
    return not name.startswith(layout.TEMPORARY)


def _pruned_at(folder: os.DirEntry[str]) -> int:
    return folder.stat(follow_symlinks=False).st_mtime_ns if folder.name.startswith(layout.PRUNED) else 0
