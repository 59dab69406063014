"""The head of a run's transparency log, to be kept where whoever has the run folder cannot reach it.

The head is a C2SP signed note of three lines: the log's name, its number of records, the root of its tree.
`harness verify RUN --head FILE` then finds out a run that was rolled back or rewritten. Without --out the
note is printed as it is, for a pipe. An existing FILE is replaced only when the log continues its head.
--cosign adds the signature of a witness (C2SP cosignature/v1), which policies can ask for. --timestamp asks a
time-stamping authority (RFC 3161) when the head was there, and puts its answer into the run's log folder.
"""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from pathlib import Path

from harness.audit.run import kept_head
from harness.commands import Outcome
from harness.commands.trust import add_trust, trusted
from harness.errors import UsageError
from harness.provenance.signing.keys import load_signer
from harness.provenance.transparency.log import Head

EXAMPLE = "harness head runs/tiny --out tiny.head --key alice.ed25519.pub"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run, where to write, and whom to trust."""
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--out", type=Path, metavar="FILE", help="file to keep it in (default: stdout)")
    parser.add_argument("--cosign", type=Path, metavar="KEY", help="as a witness: FILE is continued")
    parser.add_argument("--name", metavar="NAME", help="of the witness (default: the key file's)")
    parser.add_argument("--timestamp", metavar="URL", help="of a time-stamping authority, to ask it")
    add_trust(parser)


def run(arguments: argparse.Namespace) -> Outcome:
    """Read the log, check it, write its head."""
    taken = kept_head.take(arguments.run, trusted(arguments))
    stamped = None if arguments.timestamp is None else kept_head.stamp(taken, arguments.timestamp)
    if arguments.cosign is not None:
        if arguments.out is None:
            raise UsageError(
                "a witness remembers what it has cosigned", where=str(arguments.run), remedy="add --out FILE"
            )
        signer, name = load_signer(arguments.cosign), arguments.name or arguments.cosign.stem
        taken = kept_head.cosign(taken, arguments.out, signer, name, datetime.now(UTC))
    before = None if arguments.out is None else kept_head.write(taken, arguments.out)
    document = {
        "origin": taken.head.origin,
        "size": taken.head.size,
        "root": taken.head.root.hex(),
        "note": taken.note.decode(),
        "signature": "verified" if taken.signed else "not checked",
        "timestamp": None if stamped is None else str(stamped),
        "out": None if arguments.out is None else str(arguments.out),
        "replaced": None if before is None else {"size": before.size, "root": before.root.hex()},
    }
    if arguments.out is None:
        return Outcome(document, taken.note.decode().removesuffix("\n"))
    signature = "verified" if taken.signed else "not checked (give --key or --policy)"
    lines = [
        f"head  {arguments.out}",
        f"  log        {taken.head.origin}, {taken.head.size} records, root {taken.head.root.hex()}",
        f"  signature  {signature}; records and tiles agree with it",
        f"  before     {_before(before)}",
        *([] if stamped is None else [f"  timestamp  {stamped}"]),
        f"  use        harness verify {arguments.run} --head {arguments.out}",
    ]
    return Outcome(document, "\n".join(lines))


def _before(before: Head | None) -> str:
    return "no head was kept here" if before is None else f"{before.size} records, which the log continues"
