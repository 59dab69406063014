"""Make a policy, or look for what is wrong or odd in one.

`policy new` writes a YAML file from public keys that you have checked, with a reason beside each rule.
`policy check` reads one as `verify` would, and says what its author may not mean: people whose time is over,
a threshold that cannot be reached, kinds of statements that nobody may sign, names that are nearly right.
It also says by which digest runs name it that are made under it.
Exit code 0: nothing odd; 1: something is; 2: it is no policy.
"""

from __future__ import annotations

import argparse
import os
from datetime import UTC, datetime
from pathlib import Path

from harness.commands import Outcome
from harness.errors import UsageError, visible
from harness.format import files
from harness.provenance.policy import canonical, draft, oddities
from harness.provenance.policy.rules import Policy
from harness.provenance.signing.keyless import Subject

EXAMPLE = (
    "harness policy new --key alice.ed25519.pub alice.p256.pub --run tiny --out team.yaml "
    "&& harness policy check team.yaml"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Two actions: ``new`` and ``check``."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="new|check")
    new = actions.add_parser("new", help="make a policy from public keys")
    new.add_argument(
        "--key", type=Path, action="extend", nargs="+", default=[], metavar="PUB", help="public keys"
    )
    new.add_argument(
        "--run",
        action="extend",
        nargs="+",
        default=[],
        metavar="NAME",
        help="names or ids (default: all)",
    )
    new.add_argument("--until", metavar="DATE", help="first day that is too late, like 2027-01-01")
    new.add_argument("--threshold", type=int, metavar="N", help="people who must sign each checkpoint")
    new.add_argument("--max-age", metavar="AGE", help="refuse what is older, like 30d")
    new.add_argument("--head", type=Path, metavar="FILE", help="a log head that the run must continue")
    new.add_argument(
        "--authority",
        type=Path,
        action="extend",
        nargs="+",
        default=[],
        metavar="PEM",
        help="certificates of time-stamping authorities: each checkpoint must have a timestamp",
    )
    new.add_argument(
        "--keyless",
        action="append",
        nargs=3,
        default=[],
        metavar=("NAME", "ISSUER", "IDENTITY"),
        help="somebody whom sigstore certifies: issuer and identity of the certificate (docs/keys.md)",
    )
    new.add_argument("--trusted-root", type=Path, metavar="FILE", help="of the sigstore instance")
    new.add_argument("--out", type=Path, metavar="FILE", help="file to write (default: stdout)")
    check = actions.add_parser("check", help="find errors and oddities, with their lines")
    check.add_argument("file", type=Path, metavar="FILE")
    for action in (new, check):
        action.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> Outcome:
    """Carry out the action."""
    return _new(arguments) if arguments.action == "new" else _check(arguments.file)


def _new(arguments: argparse.Namespace) -> Outcome:
    out: Path | None = arguments.out
    if out is not None and os.path.lexists(out):
        raise UsageError("exists already", where=str(out), remedy="choose another --out")
    wish = draft.Wish(
        arguments.key,
        arguments.run,
        arguments.until,
        arguments.threshold,
        arguments.max_age,
        arguments.head,
        arguments.authority,
        [(name, Subject(issuer, identity)) for name, issuer, identity in arguments.keyless],
        arguments.trusted_root,
        Path() if out is None else out.parent,
    )
    made = draft.draft(wish, datetime.now(UTC))
    document = {
        "out": None if out is None else str(out),
        "text": made.text,
        "reasons": [{"rule": rule, "reason": reason} for rule, reason in made.reasons],
    }
    if out is None:
        return Outcome(document, made.text.removesuffix("\n"))
    files.write_durable(out, made.text.encode())
    lines = [f"policy  {out}", *(f"  {rule:<11}{reason}" for rule, reason in made.reasons)]
    return Outcome(document, "\n".join([*lines, f"  use        harness verify RUN --policy {out}"]))


def _check(file: Path) -> Outcome:
    read, odd = oddities.check(file, datetime.now(UTC))
    document = {
        "file": str(file),
        "identities": [each.name for each in read.identities],
        "threshold": read.threshold,
        "required": sorted(read.required),
        "sha256": canonical.digest(canonical.written(read)),
        "odd": [{"what": each.what, "where": each.where, "remedy": each.remedy} for each in odd],
    }
    lines = [f"odd   {each.what}: {each.where}; {each.remedy}" for each in odd]
    head = f"{'odd' if odd else 'good'}  {file}: {_told(read)}"
    digest = f"sha256 {document['sha256']}, as statements of runs name it (signing.policy)"
    # The copy in a stranger's run is looked at by this, too, with the names that they gave.
    return Outcome(document, "\n".join(map(visible, [head, *lines, digest])), int(bool(odd)))


def _told(read: Policy) -> str:
    people = ", ".join(each.name for each in read.identities)
    return f"{read.threshold} of {people}; required {', '.join(sorted(read.required))}"
