"""Verifying a run again: which payload a kept log head covers, so that it need not be hashed again.

The head was kept after a verification that found nothing, which is its owner's word. A checkpoint is covered
when the log continues that head and its record under it names the manifest and the statement that lie in the
folder now; whether its payload was changed since is what is not looked at.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from harness.audit.opening import OpenedCheckpoint
from harness.provenance import history, log
from harness.provenance.heads import Kept


def covered(
    opened: Sequence[OpenedCheckpoint], book: log.Log | None, since: Kept | None
) -> list[OpenedCheckpoint]:
    """The checkpoints whose record, with the statement that lies there now, is under ``since``."""
    if book is None or since is None:
        return []
    records = set(book.records[: since.head.size])
    return [each for each in opened if _record(each) in records]


def _record(opened: OpenedCheckpoint) -> bytes:
    now = opened.statement
    return history.record_of(
        now.run_id, now.sequence, now.step_to, opened.checkpoint_id, opened.bundle_sha256
    )


def told(since: Kept, skipped: Sequence[OpenedCheckpoint], continued: bool) -> str:
    """What was left out, in a sentence."""
    if not continued:
        return f"the log does not continue {since.source}, so everything was hashed"
    payload_of = f"{len(skipped)} checkpoint" + ("s" if len(skipped) != 1 else "")
    return (
        f"{since.source} covers {since.head.size} records: the payload of {payload_of} was not hashed again; "
        "signatures, manifests, file sets, headers and lineage were checked for all"
    )


def document(
    since: Kept | None, skipped: Sequence[OpenedCheckpoint], continued: bool
) -> dict[str, Any] | None:
    """The same as JSON; None where everything was hashed because nobody asked for less."""
    if since is None:
        return None
    names = [os.path.basename(each.folder) for each in skipped]
    return {
        "size": since.head.size,
        "root": since.head.root.hex(),
        "continued": continued,
        "not_hashed": names,
    }
