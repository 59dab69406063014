"""Check that a checkpoint, or a whole run, is what its signed statements say. Needs no torch and no GPU.

Checks signatures, the exact set of files, every digest, statements, lineage, the log and the metrics chain.
A run that began with another run's checkpoint names it; --with checks that edge too. --head gives a log head
that you have kept (`harness head`), which the run must continue; --since the one that you kept when you last
verified the run, so that only the payload that was added since is hashed.
The keys or the policy come from you, never from the folder. A P-256 key alone checks model.sig and every byte
that it signs, and cannot tell where they are from. Exit code 0: verified; 1: something is wrong; 4: evidence
is missing, so it cannot tell.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.audit.verification import text as verdict
from harness.audit.verification import verify
from harness.commands import Outcome
from harness.commands.trust import add_ancestors, add_heads, add_trust, require_own, required

EXAMPLE = "harness verify runs/tiny --key alice.ed25519.pub --key alice.p256.pub"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """PATH, whom to trust, and the runs that it began with."""
    parser.add_argument("path", type=Path, metavar="PATH", help="run, checkpoint, export or prepared corpus")
    add_trust(parser)
    add_ancestors(parser)
    add_heads(parser, "fails")
    parser.add_argument(
        "--since",
        type=Path,
        metavar="FILE",
        help="head kept at the last good verification: hash what came since",
    )


def run(arguments: argparse.Namespace) -> Outcome:
    """Check and print the verdict."""
    why = "a key that comes with the folder proves nothing"
    whom = required(arguments, str(arguments.path), why, statements=False)
    require_own(arguments, arguments.path)
    report = verify.verify(
        arguments.path,
        whom,
        beside=arguments.beside,
        head=arguments.head,
        since=arguments.since,
        quiet=arguments.json,
    )
    # Of a long run either one takes a while to write.
    document, text = (report.document(), "") if arguments.json else ({}, verdict.render(report))
    return Outcome(document, text, report.exit_code)
