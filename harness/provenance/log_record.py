"""Records of a run's log: of commits, of statements that were added later, and of hand-overs of the key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from harness.errors import VerificationFailed
from harness.format import strict_json
from harness.provenance.transparency import log

COMMIT, STATEMENT, ROTATION = "checkpoint", "statement", "key-rotation"
"""Kinds of log records."""
_RECORD_FIELDS = {
    COMMIT: {"kind", "run", "sequence", "step", "checkpoint", "bundle_sha256"},
    STATEMENT: {"kind", "run", "checkpoint", "name", "bundle_sha256"},
    ROTATION: {"kind", "run", "handover"},
}
_ORIGIN = "harness/run/"


def origin_of(run_id: str) -> str:
    """The name of a run's log, in every head."""
    return f"{_ORIGIN}{run_id}"


def run_of(origin: str) -> str | None:
    """The run id in the name of a log; None for a log that is no run's."""
    return origin.removeprefix(_ORIGIN) if origin.startswith(_ORIGIN) else None


def record_of(run_id: str, sequence: int, step: int, checkpoint: str, bundle_sha256: str) -> bytes:
    """The log record of a commit: strict JSON."""
    return strict_json.dumps(commit(run_id, sequence, step, checkpoint, bundle_sha256))


def commit(run_id: str, sequence: int, step: int, checkpoint: str, bundle_sha256: str) -> dict[str, Any]:
    """The fields of the record of a commit."""
    return {
        "kind": COMMIT,
        "run": run_id,
        "sequence": sequence,
        "step": step,
        "checkpoint": checkpoint,
        "bundle_sha256": bundle_sha256,
    }


def statement_record(run_id: str, checkpoint: str, name: str, bundle_sha256: str) -> bytes:
    """The log record of a statement that was added to ``checkpoint`` as ``name``: strict JSON."""
    return strict_json.dumps(
        {
            "kind": STATEMENT,
            "run": run_id,
            "checkpoint": checkpoint,
            "name": name,
            "bundle_sha256": bundle_sha256,
        }
    )


def rotation_record(run_id: str, handover: bytes) -> bytes:
    """The log record of a hand-over of the signing key, with the whole file in it: strict JSON."""
    return strict_json.dumps({"kind": ROTATION, "run": run_id, "handover": handover.decode()})


def handover_of(record: bytes) -> bytes | None:
    """The file in the record of a hand-over; None for a record of another kind, or one that is none."""
    if ROTATION.encode() not in record:
        return None
    try:
        fields = parse_record(record, where="log")
    except VerificationFailed:
        return None
    return str(fields["handover"]).encode() if fields["kind"] == ROTATION else None


def parse_record(data: bytes, *, where: str) -> dict[str, Any]:
    """The record in ``data``. Raises `VerificationFailed` for other fields than are written here."""
    record = strict_json.loads(data, where=where)
    kind = record.get("kind") if isinstance(record, dict) else None
    if not isinstance(record, dict) or not isinstance(kind, str) or set(record) != _RECORD_FIELDS.get(kind):
        what = "has a record that is neither of a checkpoint nor of a statement nor of a hand-over"
        raise VerificationFailed(what, where=where)
    numbers = {"sequence", "step"} & set(record)
    texts = all(isinstance(record[name], str) for name in set(record) - numbers)
    if not texts or not all(type(record[name]) is int for name in numbers):
        raise VerificationFailed("has a record with a field of another type", where=where)
    return dict(record)


def is_commit(record: Mapping[str, Any]) -> bool:
    """Whether ``record`` is that of a checkpoint."""
    return bool(record["kind"] == COMMIT)


def is_statement(record: Mapping[str, Any]) -> bool:
    """Whether ``record`` is that of a statement that was added later."""
    return bool(record["kind"] == STATEMENT)


def first_seen(book: log.Log, moments: Sequence[tuple[int, str]]) -> dict[str, str]:
    """Hex sha256 of a bundle that the log names → the earliest moment at which it is shown to be there.

    ``moments``: (size, moment) of the heads that kept files or timestamps show.
    """
    of_size: dict[int, str] = {}
    for size, moment in moments:
        of_size[size] = min(moment, of_size.get(size, moment))
    found: dict[str, str] = {}
    earliest: str | None = None
    # From the end, so that each record is read once, however many heads there are: every head with it counts.
    for size in range(max(of_size, default=0), 0, -1):
        own = of_size.get(size)
        earliest = own if earliest is None or (own is not None and own < earliest) else earliest
        if earliest is not None:
            record = parse_record(book.records[size - 1], where="log")
            found[record.get("bundle_sha256", "")] = earliest
    return found
