"""What a process that was killed has left in a run folder under temporary names.

Whoever saves or fetches holds the lock of the run folder, which goes with the process: who has the lock knows
that what lies there is nobody's.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from harness.format import layout
from harness.format.layout import RunFolder

_WRITTEN = (
    layout.RUN_CONFIG,
    layout.POLICY,
    layout.CORPUS,
    layout.TRACKING,
    layout.METRICS,
    layout.LOG,
    layout.FETCHED.removeprefix(layout.TEMPORARY),
)
"""What is written under a temporary name beside ``checkpoints/``."""


def found(run: RunFolder) -> list[Path]:
    """The leftovers of saves, fetches and small files, by name; those of a process at work as well."""
    beside = [run.root / f"{layout.TEMPORARY}{name}" for name in _WRITTEN]
    inside = run.checkpoints.glob(f"{layout.TEMPORARY}*") if run.checkpoints.is_dir() else ()
    return sorted([*inside, *(path for path in beside if path.exists())])


def clear(run: RunFolder) -> tuple[str, ...]:
    """Remove them, for a caller that holds the lock of the run folder; returns their names."""
    paths = found(run)
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return tuple(path.name for path in paths)


def in_words(names: tuple[str, ...]) -> str:
    """What was removed, in one line."""
    return f"removed {', '.join(names)}: left by a save or a fetch that was cut off"
