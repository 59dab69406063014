"""The timestamps in a run's log folder, held against the policy's authorities and the log's own records.

Each is over the head that the log had at some size (`harness.provenance.transparency.timestamp`), so one that
is good shows that so many records were there at its moment; no key of the run has a part in that. Rules:

- a policy that names authorities accepts no timestamp that is not good: one that is of another log, of a
  head that was moved to another size, or of an authority that the policy does not know is a failure
- a policy that names none looks at none of them, and a note says so
- where timestamps are required, every checkpoint in the log is under a good one; what has none is missing
- that a head was stamped does not show that there was nothing newer: anybody can have an old head stamped
  again. So a timestamp makes no evidence younger (`harness.provenance.freshness`)
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import VerificationFailed
from harness.format import files
from harness.provenance import log_record
from harness.provenance.findings import Findings
from harness.provenance.policy.rules import TIMESTAMP, Policy
from harness.provenance.transparency import log, timestamp
from harness.provenance.transparency.log import Log

CHECK = timestamp.CHECK
_MOST = 1_000_000
"""Files in the folder that are looked at."""


@dataclass(frozen=True)
class Stamped:
    """A good timestamp."""

    size: int
    """Records that were there."""
    moment: str
    """The latest moment at which they were, as ``2026-11-23T20:00:00Z``."""
    authority: str

    def document(self) -> dict[str, Any]:
        """As plain JSON."""
        return {"size": self.size, "moment": self.moment, "authority": self.authority}


def sizes(folder: Path) -> list[int]:
    """Of the heads that have a timestamp in the log ``folder``, good or not; nothing behind a link is in it.

    Raises `EnvironmentFault` for a disk that cannot be read.
    """
    place = folder / timestamp.FOLDER
    try:
        names = [] if place.is_symlink() else os.listdir(place)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        if error.errno == errno.ELOOP:
            return []  # the log is a link to itself: a finding where links are
        raise files.unreadable(error, str(place)) from error
    found = (timestamp.size_of(f"{timestamp.FOLDER}/{name}") for name in names[:_MOST])
    return sorted(size for size in found if size is not None)


def check(folder: Path, book: Log, there: Sequence[int], policy: Policy, findings: Findings) -> list[Stamped]:
    """The good ones of the timestamps ``there``, under the records of ``book``; the others are findings.

    Those of more records than ``book`` has are `harness.audit.run.log_folder`'s business.
    """
    found = []
    for size in there:
        if size <= book.head.size:
            stamped = findings.attempt(CHECK, _opened, folder, book, size, policy)
            found += [] if stamped is None else [stamped]
    return found


def require(book: Log, stamped: Sequence[Stamped], policy: Policy, findings: Findings, where: str) -> None:
    """Where ``policy`` requires timestamps: none of the checkpoints in ``book`` is without."""
    if TIMESTAMP not in policy.required:
        return
    covered = max((each.size for each in stamped), default=0)
    try:
        rest = [log_record.parse_record(data, where=where) for data in book.records[covered:]]
    except VerificationFailed:
        return  # a finding of the log's own
    bare = [record for record in rest if log_record.is_commit(record)]
    if bare:
        many = "1 checkpoint, that" if len(bare) == 1 else f"{len(bare)} checkpoints, the first that"
        what = f"the policy requires timestamps, and none covers {many} of step {bare[0]['step']}"
        findings.missing(CHECK, what, where)


def _opened(folder: Path, book: Log, size: int, policy: Policy) -> Stamped:
    path = folder / timestamp.path_of(size)
    data = files.read_limited(path, timestamp.LIMIT)
    message = log.text_of(log.Head(size, book.root_of_prefix(size), book.head.origin))
    stamp = timestamp.opened(data, message, policy.authorities, where=str(path))
    return Stamped(size, stamp.moment, stamp.authority)
