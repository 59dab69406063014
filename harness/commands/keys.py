"""Make a signing identity, or show what a key file holds.

`keys new` writes NAME.key (private, mode 0600: an Ed25519 key for statements and the log, a P-256 key for
model.sig), NAME.ed25519.pub and NAME.p256.pub (give these to auditors). Nothing is ever overwritten.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.commands import Outcome
from harness.provenance import keys

EXAMPLE = "harness keys new --out keys/alice && harness keys show keys/alice.ed25519.pub"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Two actions: ``new`` and ``show``."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="new|show")
    new = actions.add_parser("new", help="make an identity")
    new.add_argument("--out", type=Path, metavar="NAME", help="path without ending (default: user's config)")
    show = actions.add_parser("show", help="algorithm and key id of a private or public key file")
    show.add_argument("file", type=Path)
    for action in (new, show):
        action.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> Outcome:
    """Carry out the action."""
    if arguments.action == "new":
        return _new(arguments.out or keys.user_key_path().with_suffix(""))
    return _show(arguments.file)


def _new(out: Path) -> Outcome:
    files = keys.create(out)
    document = {
        "private": str(files.private),
        "public": [str(path) for path in files.public],
        "key_ids": [key.key_id for key in map(keys.load_public, files.public)],
    }
    lines = [
        f"private  {files.private}  (mode 0600; config: signing.key; keep it off shared disks)",
        *(f"public   {path}  (give to auditors: verify --key {path})" for path in files.public),
    ]
    return Outcome(document, "\n".join(lines))


def _show(file: Path) -> Outcome:
    shown = keys.describe(file)
    document = {
        "file": str(file),
        "private": shown.private,
        "keys": [{"algorithm": key.algorithm, "key_id": key.key_id} for key in shown.keys],
    }
    kind = "private" if shown.private else "public"
    return Outcome(document, "\n".join(f"{kind} {key.algorithm} {key.key_id}" for key in shown.keys))
