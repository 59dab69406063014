"""metrics.jsonl of a run, joined from the parts that its checkpoints have added to a store.

The parts go one after the other, a piece at a time, into a file beside the one that is there, which takes its
name when it is whole.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from harness.errors import EvidenceIncomplete, VerificationFailed
from harness.format import files as durable
from harness.format import layout
from harness.format.layout import RunFolder
from harness.format.metrics_line import step_of
from harness.stores.client import PIECE, ObjectStore
from harness.stores.contents import Contents

_LIMIT = 1 << 34
"""Of the lines that one checkpoint has added, in bytes."""
_TAIL = 4 << 20
"""Bytes at the end of a file in which its last line is looked for; a line has 1 MiB at most."""


def bring(
    store: ObjectStore,
    contents: Contents,
    target: Path,
    current: Path,
    without: Collection[str] = (),
    *,
    ahead: bool,
) -> bool:
    """Join the parts of the checkpoints that are not among ``without`` into ``target``, unless ``current``
    goes as far and the store's log is not ``ahead``; returns whether it did.

    Raises `EvidenceIncomplete` for a part that is not there, `VerificationFailed` for one that is too large.
    """
    names = [name for name in contents.all if name not in without]
    if not names or (not ahead and last_step(current) >= layout.step_of(names[-1])):
        return False
    durable.make_folder(target.parent)
    with open(target, "wb") as stream:
        for name in names:
            path = f"{layout.METRICS_PARTS}/{name}.jsonl"
            size = contents.objects.get(path)
            if size is None:
                raise EvidenceIncomplete("is not in the store", where=store.at(path))
            if size > _LIMIT:
                raise VerificationFailed(f"is larger than {_LIMIT} bytes", where=store.at(path))
            for piece in store.pieces(path, size):
                stream.write(piece)
        stream.flush()
        os.fsync(stream.fileno())
    return True


def place(joined: Path, run: RunFolder) -> None:
    """Let ``joined`` take the place of the run's file, which is kept in ``events/`` if it says otherwise."""
    if run.metrics.exists() and not _begins_with(joined, run.metrics):
        aside = run.root / layout.EVENTS
        aside.mkdir(exist_ok=True)
        number = 1
        while (target := aside / f"superseded-metrics-{number}.jsonl").exists():
            number += 1
        run.metrics.rename(target)
    joined.replace(run.metrics)


def last_step(path: Path) -> int:
    """The step of the last whole line of a metrics file; 0 when there is none."""
    if not path.exists():
        return 0
    with open(path, "rb") as stream:
        stream.seek(max(0, path.stat().st_size - _TAIL))
        steps = (step_of(line) for line in reversed(stream.read(_TAIL).splitlines(keepends=True)))
        return next((step for step in steps if step is not None), 0)


def _begins_with(path: Path, start: Path) -> bool:
    with open(path, "rb") as whole, open(start, "rb") as first:
        while piece := first.read(PIECE):
            if whole.read(len(piece)) != piece:
                return False
    return True
