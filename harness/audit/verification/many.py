"""Many checkpoints, examined by several processes: signatures and JSON keep a core busy each.

The processes are forks that share nothing afterwards: each takes the next few folders and sends back what
`harness.audit.folders.opening.examine_folder` found, in the folders' order. Where forking is not safe (other
threads run, another system than Linux) or not worth it, this process does it all, with the same result.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.audit.folders import opening
from harness.audit.folders.opening import OpenedCheckpoint
from harness.cores import process_cpu_count
from harness.errors import EnvironmentFault
from harness.provenance.findings import Findings
from harness.provenance.policy.rules import Policy
from harness.terminal import progress

_WORTH_IT = 200
"""Folders below which starting processes costs more than it saves."""
_AT_ONCE = 50
"""Folders that a process takes at a time."""


@dataclass(frozen=True)
class _Task:
    """What every process has from the fork on; keys cannot be sent."""

    folders: Sequence[Path]
    policy: Policy
    seen: Mapping[str, str]
    known: Mapping[str, str]


_Result = tuple[list[OpenedCheckpoint | None], Findings, EnvironmentFault | None]
_task: _Task | None = None


def examine(
    folders: Sequence[Path],
    policy: Policy,
    findings: Findings,
    seen: Mapping[str, str],
    known: Mapping[str, str],
    *,
    quiet: bool,
) -> list[OpenedCheckpoint | None]:
    """`opening.examine_folder` of each of ``folders``. Raises `EnvironmentFault` for a bad disk and for a
    process that was killed."""
    processes = min(process_cpu_count(), len(folders) // _WORTH_IT + 1) if _may_fork() else 1
    opened: list[OpenedCheckpoint | None] = []
    with progress(len(folders), "checkpoints", "verify", quiet=quiet) as bar:
        if processes < 2:
            for folder in folders:
                opened.append(opening.examine_folder(folder, policy, findings, seen, known))
                bar.advance(1)
        else:
            for some, found in _in_processes(_Task(folders, policy, seen, known), processes):
                opened += some
                findings.extend(found)
                bar.advance(len(some))
    return opened


def _may_fork() -> bool:
    """A fork has only the thread that called it, so a lock that another thread holds would stay locked."""
    alone = threading.active_count() == 1 and not multiprocessing.current_process().daemon
    return sys.platform.startswith("linux") and alone


def _in_processes(task: _Task, processes: int) -> Iterator[tuple[list[OpenedCheckpoint | None], Findings]]:
    # Here, since most verifications need none.
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    global _task
    _task = task
    starts = range(0, len(task.folders), _AT_ONCE)
    fork = multiprocessing.get_context("fork")
    try:
        with ProcessPoolExecutor(processes, fork, _begin) as pool:
            for opened, findings, fault in pool.map(_examine, starts):
                if fault is not None:
                    pool.shutdown(cancel_futures=True)
                    raise fault
                yield opened, findings
    except BrokenProcessPool as error:
        raise EnvironmentFault(
            "a process that verifies died", remedy="look for the out-of-memory killer, then verify again"
        ) from error
    finally:
        _task = None


def _begin() -> None:
    """First in a process. Ctrl-C reaches all of the terminal's processes; the one that waits decides."""
    gc.disable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _examine(start: int) -> _Result:
    """In a process: the folders from ``start`` on."""
    opened: list[OpenedCheckpoint | None] = []
    findings = Findings()
    assert _task is not None
    task = _task
    try:
        for folder in task.folders[start : start + _AT_ONCE]:
            opened.append(opening.examine_folder(folder, task.policy, findings, task.seen, task.known))
    except EnvironmentFault as fault:
        return opened, findings, fault
    return opened, findings, None


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """Statements hold no cycles, and each collection of Python's would walk all that have come so far."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
