"""Hand-overs of the signing key in a run's log: who is trusted because of them, and entering one.

A record of the log carries the whole file (`harness.provenance.policy.rotation`), so that it goes wherever
the log goes, and cannot be taken out of it. Both of its signatures are checked before anything is trusted, so
the head of the log need not be checked first; where the record stands is checked with the log
(`harness.provenance.history`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from harness.audit.run import seen
from harness.audit.run.seen import Seen
from harness.errors import EvidenceIncomplete, UsageError, VerificationFailed
from harness.format import files, layout
from harness.format.layout import RunFolder
from harness.provenance import log_record
from harness.provenance.findings import Findings
from harness.provenance.policy import rotation
from harness.provenance.policy.rotation import Claim
from harness.provenance.policy.rules import Policy, Rotation
from harness.provenance.signing.keys import Signer, public_keys
from harness.provenance.transparency import log, tiles


@dataclass(frozen=True)
class Trust:
    """A policy with the keys that the hand-overs in a log add to it."""

    policy: Policy
    rotations: tuple[Rotation, ...] = ()
    """In the order of the log."""


def trust(path: Path, policy: Policy, shown: Seen | None = None, *, logged: Path | None = None) -> Trust:
    """``policy`` and what the log of ``path`` adds, which is a run or a checkpoint in one; ``logged``: the
    folder of that log, where it lies elsewhere.

    ``shown``: what `harness.audit.run.seen` has found in that log; looked up here when it is not given and
    there is a hand-over.

    Raises `VerificationFailed` for a hand-over that breaks a rule or that no accepted key has signed.
    """
    run = layout.run_of(path)
    folder = logged or (None if run is None else run.log)
    found = [] if folder is None else list(_claims(folder))
    if folder is None or not found:
        return Trust(policy)
    if shown is None:
        shown = seen.look(folder, policy, Findings())
    claims = [Claim(data, f"{folder}, record {number}", shown.earliest(number)) for number, data in found]
    more, rotations = rotation.extended(policy, claims, timed=False)
    return Trust(more, tuple(rotations))


def examine(path: Path, policy: Policy, shown: Seen, findings: Findings) -> Trust:
    """`trust` as a verification asks: hand-overs are told in ``findings``, and a wrong one adds nobody."""
    try:
        found = trust(path, policy, shown)
    except VerificationFailed as error:
        findings.bad(rotation.CHECK, error.what, error.where or str(path), error.remedy)
        return Trust(policy)
    for each in found.rotations:
        findings.note(f"the key {each.old_id[:16]}… handed over to {each.new_id[:16]}…: {each.reason}")
    if found.rotations:
        findings.passed.append(rotation.CHECK)
    return found


def check_head(folder: Path, policy: Policy, where: str) -> None:
    """Raise `VerificationFailed`, of ``where``, unless a key that ``policy`` accepts, or one that it handed
    over to, has signed the head of the log ``folder``."""
    shown = seen.look(folder, policy, Findings())
    accepted = trust(folder, policy, shown, logged=folder).policy.as_of(shown.whole)
    note = files.read_limited(folder / log.HEAD, log.NOTE_LIMIT)
    log.open_note(note, accepted.statement_keys, where=where)


def enter(run: RunFolder, data: bytes, new: Signer) -> int | None:
    """Enter the hand-over ``data`` into the log of ``run``, whose head ``new`` signs from then on.

    Returns the number of the record, None when it was there already. Raises `UsageError` for a run without a
    log, `EnvironmentFault` while a job trains there, `VerificationFailed` when the log is not signed by the
    key that hands over.
    """
    if not (run.log / log.HEAD).is_file():
        remedy = "name a run folder, or leave --run out"
        raise UsageError("has no log that a new key could go on with", where=str(run.root), remedy=remedy)
    claim = Claim(data, "the hand-over")
    found = rotation.opened(claim, public_keys(new))
    if found is None:
        what = "is a hand-over to another key than the one that is given"
        raise UsageError(what, where=claim.where, remedy="give the key that it names: --to KEY")
    with files.locked(run.root, wait=False):
        book = log.read(run.log, [*found.old, *found.new])
        run_id = str(log_record.parse_record(book.records[0], where=str(run.log))["run"])
        record = log_record.rotation_record(run_id, data)
        if record in book.records:
            return None
        log.read(run.log, found.old)
        return log.append(run.log, record, new, book.head.origin, opened_by=found.old).size - 1


def _claims(folder: Path) -> Iterator[tuple[int, bytes]]:
    """(number of its record, file) of each hand-over that the log claims to hold; other records are not
    parsed, so a long log costs little."""
    try:
        head = log.claimed(files.read_limited(folder / log.HEAD, log.NOTE_LIMIT), where=str(folder))
        for index, width in tiles.row(head.size):
            path = folder / tiles.entries_path(index, width)
            data = files.read_limited(path, tiles.FILE_LIMIT)
            if log_record.ROTATION.encode() not in data:
                continue
            for offset, record in enumerate(tiles.parse_entries(data, width, str(path))):
                found = log_record.handover_of(record)
                if found is not None:
                    yield index * tiles.WIDTH + offset, found
    except (EvidenceIncomplete, VerificationFailed):
        return  # a log that cannot be read adds nothing, and is a finding where it is checked
