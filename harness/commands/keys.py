"""Make a signing identity, show what a key file holds, or hand over to the next one.

`keys new` writes NAME.key (private, mode 0600: an Ed25519 key for statements and the log, a P-256 key for
model.sig), NAME.ed25519.pub and NAME.p256.pub (give these to auditors). Nothing is ever overwritten.

Keys that ssh-agent or a PKCS#11 token holds are not made here: a file names them (docs/keys.md), and
`keys show FILE --out NAME` writes the .pub files of those in a token.

`keys rotate` writes a statement by which --from hands over to --to, signed by both, and enters it into the
log of each --run, which then goes on under the new key (signing.key). Whoever trusts either key verifies all
of that run; for checkpoints apart from their run, a policy names the file under `rotations`.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from harness.audit.run import handover
from harness.commands import Outcome
from harness.errors import UsageError
from harness.format import files, moments
from harness.format.layout import RunFolder
from harness.provenance.policy import rotation
from harness.provenance.policy.rotation import Claim
from harness.provenance.signing import keys

EXAMPLE = "harness keys new --out keys/alice && harness keys show keys/alice.ed25519.pub"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Three actions: ``new``, ``show`` and ``rotate``."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="new|show|rotate")
    new = actions.add_parser(
        "new", help="make an identity", epilog="example: harness keys new --out keys/alice"
    )
    new.add_argument("--out", type=Path, metavar="NAME", help="path without ending (default: user's config)")
    show = actions.add_parser(
        "show",
        help="algorithms and key ids of a key file, or of what it names in a token",
        epilog="example: harness keys show keys/alice.ed25519.pub",
    )
    show.add_argument("file", type=Path)
    show.add_argument(
        "--out", type=Path, metavar="NAME", help="write NAME.ed25519.pub and NAME.p256.pub, too"
    )
    rotate = actions.add_parser(
        "rotate",
        help="hand over to another key, signed by the old and the new one",
        epilog="example: harness keys rotate --from alice.key --to alice-2.key --run runs/tiny",
    )
    rotate.add_argument("--from", type=Path, required=True, dest="old", metavar="OLD.key")
    rotate.add_argument("--to", type=Path, required=True, dest="new", metavar="NEW.key")
    rotate.add_argument(
        "--run", type=Path, action="extend", nargs="+", default=[], metavar="RUN", help="runs that go on"
    )
    rotate.add_argument("--reason", default="no reason given", metavar="TEXT", help="signed, too")
    rotate.add_argument("--out", type=Path, metavar="FILE", help="default: NEW.rotation; used when it exists")
    for action in (new, show, rotate):
        action.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> Outcome:
    """Carry out the action."""
    if arguments.action == "new":
        return _new(arguments.out or keys.user_key_path().with_suffix(""))
    return _rotate(arguments) if arguments.action == "rotate" else _show(arguments.file, arguments.out)


def _new(out: Path) -> Outcome:
    made = keys.create(out)
    document = {
        "private": str(made.private),
        "public": [str(path) for path in made.public],
        "key_ids": [key.key_id for key in map(keys.load_public, made.public)],
    }
    lines = [
        f"private  {made.private}  (mode 0600; config: signing.key; keep it off shared disks)",
        *map(_for_auditors, made.public),
    ]
    return Outcome(document, "\n".join(lines))


def _show(file: Path, out: Path | None) -> Outcome:
    shown = keys.describe(file)
    written = () if out is None else keys.write_public(shown.keys, out)
    document = {
        "file": str(file),
        "private": shown.kind != "public",
        "keys": [{"algorithm": key.algorithm, "key_id": key.key_id} for key in shown.keys],
        "written": [str(path) for path in written],
    }
    lines = [f"{shown.kind} {key.algorithm} {key.key_id}" for key in shown.keys]
    return Outcome(document, "\n".join([*lines, *map(_for_auditors, written)]))


def _for_auditors(path: Path) -> str:
    return f"public   {path}  (give to auditors: verify --key {path})"


def _rotate(arguments: argparse.Namespace) -> Outcome:
    old, new = keys.load_signer(arguments.old), keys.load_signer(arguments.new)
    out: Path = arguments.out or arguments.new.with_suffix(".rotation")
    made = not os.path.lexists(out)
    if made:
        files.write_durable(out, rotation.build(old, new, moments.now(), arguments.reason))
    data = files.read_given(out, "what is there", rotation.LIMIT, "choose another --out")
    found = rotation.opened(Claim(data, str(out)), keys.public_keys(old))
    if found is None or found.new_id != new.ed25519_id:
        raise UsageError("is a hand-over between other keys", where=str(out), remedy="choose another --out")
    entered = {run: handover.enter(RunFolder(run), data, new) for run in arguments.run}
    document = {
        "file": str(out),
        "made": made,
        "old": found.old_id,
        "new": found.new_id,
        "at": found.at,
        "reason": found.reason,
        "runs": [{"run": str(run), "record": record} for run, record in entered.items()],
    }
    lines = [
        f"hand-over  {out}{'' if made else ' (was there)'}",
        f"  old      ed25519 {found.old_id}, until {found.at}",
        f"  new      ed25519 {found.new_id}",
        *(f"  run      {run}: {_entered(record)}" for run, record in entered.items()),
        f"  use      signing.key={arguments.new}; in a policy, rotations: [{out.name}]",
    ]
    return Outcome(document, "\n".join(lines))


def _entered(record: int | None) -> str:
    return "is in its log already" if record is None else f"record {record} of its log"
