"""Verifying a run again: what a kept log head covers, so that it need not be hashed or verified again.

The head was kept after a verification that found nothing, which is its owner's word. A checkpoint is covered
when the log continues that head and its record under it names the manifest and the statement that lie in the
folder now. These are then the bytes that were verified: no signature is computed over them again, and they
are not compared with each other again. What is not looked at is whether payload was changed since, and of
pruned checkpoints the SLSA statement and model.sig, which speak of nothing that is still there
(`harness.provenance.verifier`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from harness.audit.folders.opening import OpenedCheckpoint
from harness.errors import VerificationFailed
from harness.provenance import log_record
from harness.provenance.transparency import log
from harness.provenance.transparency.heads import Kept
from harness.words import counted


def known(book: log.Log | None, since: Kept | None) -> dict[str, str]:
    """Hex sha256 of each checkpoint's bundle → checkpoint id, of the records under ``since`` in the log
    ``book``; empty when that log does not continue ``since``, which is a finding where it is checked."""
    if book is None or since is None or since.head.size > book.head.size:
        return {}
    size, head = since.head.size, since.head
    if (book.head.origin, book.root_of_prefix(size)) != (head.origin, head.root):
        return {}
    try:
        records = [log_record.parse_record(data, where="log") for data in book.records[:size]]
    except VerificationFailed:
        return {}
    return {each["bundle_sha256"]: each["checkpoint"] for each in records if log_record.is_commit(each)}


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
    return log_record.record_of(
        now.run_id, now.sequence, now.step_to, opened.checkpoint_id, opened.bundle_sha256
    )


def told(since: Kept, skipped: Sequence[OpenedCheckpoint], continued: bool) -> str:
    """What was left out, in a sentence."""
    if not continued:
        return f"the log does not continue {since.source}, so everything was hashed"
    payload_of = counted(len(skipped), "checkpoint")
    pruned = sum(each.kind == "pruned" for each in skipped)
    left_out = f", nor SLSA statement and model.sig of the {pruned} pruned ones verified" if pruned else ""
    return (
        f"{since.source} covers {since.head.size} records: the payload of {payload_of} was not hashed again"
        f"{left_out}; statements and manifests are the bytes that were verified then; file sets, headers and "
        "lineage were checked for all"
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
