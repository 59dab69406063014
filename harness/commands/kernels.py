"""Print the nondeterminism ledger of a checkpoint: which order-dependent kernels ran, and what was looked at.

PATH is a checkpoint folder, or a run folder, whose newest checkpoint is then read. The ledger counts as
verified only with --key (or after `harness verify`). Exit code 4 when nothing was observed.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

from harness.audit import kernels
from harness.audit.opening import open_statement
from harness.commands import Outcome
from harness.errors import EvidenceIncomplete, VerificationFailed
from harness.format import files, layout
from harness.format.ledger import Ledger
from harness.provenance.keys import load_public
from harness.provenance.policy import from_keys

EXAMPLE = "harness kernels runs/tiny --key keys/me.ed25519.pub"

_LIMIT = 64 << 20  # bytes; a ledger of the largest size that `Ledger.parse` accepts is smaller


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """PATH and the keys to check it with."""
    parser.add_argument("path", type=Path, metavar="PATH", help="checkpoint folder or run folder")
    parser.add_argument(
        "--key", type=Path, nargs="+", default=[], metavar="PUB", help="public keys that must have signed it"
    )


def run(arguments: argparse.Namespace) -> Outcome:
    """Read, check when a key was given, print."""
    checkpoint = newest(arguments.path)
    data = _read(checkpoint)
    if arguments.key:
        _check(checkpoint, data, arguments.key)
    ledger = Ledger.parse(data, str(checkpoint / layout.LEDGER))
    verified = bool(arguments.key)
    trust = "signed with a given key" if verified else "not verified (give --key, or run harness verify)"
    return Outcome(
        document={"checkpoint": str(checkpoint), "verified": verified, **kernels.document(ledger)},
        text=f"{checkpoint}  {trust}\n{kernels.render(ledger)}",
        exit_code=0 if ledger.observed_anything else EvidenceIncomplete.exit_code,
    )


def newest(path: Path) -> Path:
    """The checkpoint that PATH means: itself, or the newest complete one of a run."""
    if layout.kind_of(path) == "checkpoint":
        return path
    complete = layout.RunFolder(path).complete()
    if not complete:
        raise EvidenceIncomplete("the run has no complete checkpoint", where=str(path))
    return complete[-1]


def _read(checkpoint: Path) -> bytes:
    file = checkpoint / layout.LEDGER
    if not file.exists():
        raise EvidenceIncomplete(
            f"no {layout.LEDGER}",
            where=str(checkpoint),
            remedy="choose a checkpoint that still has its payload",
        )
    return files.read_limited(file, _LIMIT)


def _check(checkpoint: Path, data: bytes, keys: list[Path]) -> None:
    """That one of ``keys`` signed the statement and that manifest and statement mean these bytes."""
    policy = from_keys([load_public(key) for key in keys])
    opened = open_statement(checkpoint, policy)
    digest = hashlib.sha256(data).hexdigest()
    listed = {entry.path: entry.sha256 for entry in opened.manifest.files}
    stated = opened.statement.predicate["determinism"]["ledger"]
    if listed.get(layout.LEDGER) != digest or stated is None or stated["sha256"] != digest:
        raise VerificationFailed(
            "the ledger is not the one that was signed", where=str(checkpoint / layout.LEDGER)
        )
