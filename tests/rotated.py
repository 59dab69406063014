"""Hand-overs of signing keys, for attacks and honest stories; whatever a person with the keys can sign."""

from __future__ import annotations

from pathlib import Path

import run_folder
from run_folder import SampleRun

from harness.audit.run import handover
from harness.format import layout
from harness.format.layout import RunFolder
from harness.provenance import log_record
from harness.provenance.policy import rotation
from harness.provenance.policy.rotation import Claim
from harness.provenance.policy.rules import Rotation
from harness.provenance.signing.keys import Signer
from harness.provenance.transparency import log

AT = "2026-11-23T20:00:00Z"
"""When the checkpoints of `run_folder` say that they were made."""


def another(beside: Path, name: str = "second") -> Signer:
    """One more identity, whose files lie beside the run folder ``beside``."""
    return run_folder.identity(beside.parent / name)


def hand_over(run: SampleRun, new: Signer, at: str = AT) -> bytes:
    """Enter a hand-over to ``new`` into the log of ``run``, which goes on under it; returns the file."""
    data = rotation.build(run.signer, new, at, "the laptop is sold")
    handover.enter(RunFolder(run.root), data, new)
    run.signer = new
    run.log_head = log.read_claimed(run.folder.log).head
    return data


def record_of(run: SampleRun, data: bytes) -> bytes:
    """The record of a hand-over in the log of ``run``."""
    return log_record.rotation_record(run.run_id, data)


def records(root: Path) -> list[bytes]:
    """Of the log of the run ``root``."""
    return list(log.read_claimed(root / layout.LOG).records)


def read(data: bytes, *, by: Signer) -> Rotation:
    """The hand-over in ``data``, opened by somebody who trusts ``by``."""
    found = rotation.opened(Claim(data, "there"), run_folder.keys.public_keys(by))
    assert found is not None
    return found
