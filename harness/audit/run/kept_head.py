"""Taking the head of a run's log, to be kept outside the run folder."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from harness import timestamp_url
from harness.audit.run import handover
from harness.errors import UsageError, VerificationFailed, storage_fault
from harness.format import files, layout
from harness.format.layout import RunFolder
from harness.provenance.findings import Findings
from harness.provenance.policy.rules import Policy
from harness.provenance.signing.keys import Signer
from harness.provenance.transparency import heads, log, timestamp, timestamp_client, witness
from harness.provenance.transparency.heads import Kept
from harness.provenance.transparency.log import Head, Log

_OTHER = "name another --out"


@dataclass(frozen=True)
class Taken:
    """A log and the signed note of its head."""

    book: Log
    folder: Path
    """Of the log."""
    note: bytes
    signed: bool
    """Whether a key that the caller accepts has signed the note."""

    @property
    def head(self) -> Head:
        """Origin, size and root."""
        return self.book.head


def take(root: Path, policy: Policy | None) -> Taken:
    """The head of the run ``root``, which its records and tiles agree with; without ``policy`` by whomever.

    Raises `UsageError` for what is no run folder, else as `harness.provenance.transparency.log.read`.
    """
    if layout.kind_of(root) != "run":
        raise UsageError("is no run folder, so it has no log", where=str(root), remedy="name the run folder")
    folder = RunFolder(root).log
    note = files.read_limited(folder / log.HEAD, log.NOTE_LIMIT)
    if policy is None:
        head = log.claimed(note, where=str(folder / log.HEAD))
        return Taken(log.read_under(folder, head), folder, note, False)
    keys = handover.trust(root, policy).policy.statement_keys
    head = log.open_note(note, keys, where=str(folder / log.HEAD))
    return Taken(log.read_under(folder, head), folder, note, True)


def stamp(taken: Taken, url: str) -> Path:
    """Have the authority at ``url`` timestamp the head, unless it is; returns the file in the log folder.

    Raises `UsageError` for what is no such URL, `EnvironmentFault` when there is no good answer.
    """
    if not timestamp_url.is_valid(url):
        remedy = "give the address of a time-stamping authority"
        raise UsageError(f"{url!r} is no {timestamp_url.FORM}", where="--timestamp", remedy=remedy)
    path = taken.folder / timestamp.path_of(taken.head.size)
    if not os.path.lexists(path):  # an older timestamp proves more
        timestamp_client.write(taken.folder, taken.head, url)
    return path


def cosign(taken: Taken, out: Path, signer: Signer, name: str, now: datetime) -> Taken:
    """``taken`` with the cosignature of a witness, and with those that the same head has in ``out``.

    Raises `UsageError` where nobody has checked who signed the log.
    """
    if not taken.signed:
        raise UsageError("a witness checks whose log it is", where=str(out), remedy="add --key or --policy")
    note = taken.note
    if os.path.lexists(out):
        there = files.read_given(out, "what is there", log.NOTE_LIMIT, _OTHER)
        if there.startswith(note):
            note = there
    return replace(taken, note=witness.cosign(note, signer, name, now, where=str(out)))


def write(taken: Taken, out: Path) -> Head | None:
    """Write the note to ``out``; returns the head that it replaces.

    Raises `VerificationFailed` when ``out`` holds a head that the log does not continue: that file is the
    evidence, and stays as it is; `UsageError` when it holds something else, `EnvironmentFault` when it cannot
    be written.
    """
    out = files.real(out)
    if out.is_dir():
        raise UsageError(
            "is a folder, and a head is a file", where=str(out), remedy=f"--out {out / 'run.head'}"
        )
    layout.require_unsigned(out)
    before = None
    if os.path.lexists(out):
        note = files.read_given(out, "what is there", log.NOTE_LIMIT, _OTHER)
        try:
            before = log.claimed(note, where=str(out))
        except VerificationFailed as error:
            raise UsageError("exists, and is no log head", where=str(out), remedy=_OTHER) from error
        findings = Findings()
        heads.check(taken.book, [Kept(before, f"the head in {out.name}")], findings, str(out))
        findings.raise_first()
        if note.startswith(taken.note):
            return before  # the same head, and what witnesses have added to it
    try:
        files.write_durable(out, taken.note)
    except OSError as error:
        raise storage_fault(error, "writing a head", out) from error
    return before
