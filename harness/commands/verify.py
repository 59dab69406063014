"""Check that a checkpoint, or a whole run, is what its signed statements say. Needs no torch and no GPU.

Checks signatures, the exact set of files, every digest, statements, lineage, the log and the metrics chain.
The keys or the policy come from you, never from the folder. Exit code 0: verified; 1: something is wrong;
4: evidence is missing, so it cannot tell.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.audit import verdict, verify
from harness.commands import Outcome
from harness.errors import UsageError
from harness.provenance import policy
from harness.provenance.keys import load_public
from harness.provenance.policy import Policy

EXAMPLE = "harness verify runs/tiny --key alice.ed25519.pub --key alice.p256.pub"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """PATH and whom to trust."""
    parser.add_argument("path", type=Path, metavar="PATH", help="run folder or checkpoint folder")
    add_trust(parser)


def add_trust(parser: argparse.ArgumentParser) -> None:
    """``--key`` and ``--policy``, as every verb of the auditing half takes them."""
    trust = parser.add_mutually_exclusive_group()
    trust.add_argument(
        "--key",
        type=Path,
        action="extend",
        nargs="+",
        default=[],
        metavar="PUB",
        help="public keys of the signer: Ed25519 for statements and log, P-256 for model.sig",
    )
    trust.add_argument("--policy", type=Path, metavar="FILE", help="who may sign what (docs/verify.md)")


def trusted(arguments: argparse.Namespace) -> Policy | None:
    """The policy that the arguments mean; None when they name neither key nor policy."""
    if arguments.policy is not None:
        return policy.load(arguments.policy)
    return policy.from_keys([load_public(path) for path in arguments.key]) if arguments.key else None


def run(arguments: argparse.Namespace) -> Outcome:
    """Check and print the verdict."""
    whom = trusted(arguments)
    if whom is None:
        raise UsageError(
            "whom to trust is not said, and a key that comes with the folder proves nothing",
            where=str(arguments.path),
            remedy="give --key NAME.ed25519.pub (and NAME.p256.pub), or --policy FILE",
        )
    report = verify.verify(arguments.path, whom, quiet=arguments.json)
    return Outcome(report.document(), verdict.render(report), report.exit_code)
