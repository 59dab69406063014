"""Print the nondeterminism ledger of a checkpoint: which order-dependent kernels ran, and what was looked at.

PATH is a checkpoint folder, or a run folder, whose newest checkpoint is then read, or the state that it kept
when it became non-finite after that. The ledger counts as verified only with --key or --policy. Exit code 4
when nothing was observed.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

from harness.audit import kernels
from harness.audit.folders import story
from harness.audit.folders.opening import open_checkpoint
from harness.commands import Outcome
from harness.commands.trust import add_trust, trusted
from harness.errors import EvidenceIncomplete, VerificationFailed, visible
from harness.format import files, layout
from harness.format.ledger import Ledger
from harness.provenance.policy.rules import Policy

EXAMPLE = "harness kernels runs/tiny --key alice.ed25519.pub"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """PATH and whom to trust."""
    parser.add_argument("path", type=Path, metavar="PATH", help="checkpoint folder or run folder")
    add_trust(parser)


def run(arguments: argparse.Namespace) -> Outcome:
    """Read, check when a key was given, print."""
    checkpoint = story.last(arguments.path)
    policy = trusted(arguments)
    data = _read(checkpoint)
    if policy is not None:
        _check(checkpoint, data, policy)
    ledger = Ledger.parse(data, str(checkpoint / layout.LEDGER))
    verified = policy is not None
    trust = "signed with a given key" if verified else story.NOT_VERIFIED
    return Outcome(
        document={"checkpoint": str(checkpoint), "verified": verified, **kernels.document(ledger)},
        text=f"{visible(str(checkpoint))}  {trust}\n{kernels.render(ledger)}",
        exit_code=0 if ledger.observed_anything else EvidenceIncomplete.exit_code,
    )


def _read(checkpoint: Path) -> bytes:
    file = checkpoint / layout.LEDGER
    if not file.exists():
        raise EvidenceIncomplete(
            f"no {layout.LEDGER}",
            where=str(checkpoint),
            remedy="choose a checkpoint that still has its payload",
        )
    return files.read_limited(file, story.LEDGER_LIMIT)


def _check(checkpoint: Path, data: bytes, policy: Policy) -> None:
    """That the checkpoint is authentic and that manifest and statement mean these bytes."""
    opened = open_checkpoint(checkpoint, policy)
    digest = hashlib.sha256(data).hexdigest()
    listed = opened.manifest.digests
    stated = opened.statement.predicate["determinism"]["ledger"]
    if listed.get(layout.LEDGER) != digest or stated is None or stated["sha256"] != digest:
        raise VerificationFailed(
            "the ledger is not the one that was signed", where=str(checkpoint / layout.LEDGER)
        )
