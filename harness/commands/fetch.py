"""Bring a run from an object store into a folder, to verify it there or to look at it.

Brings log, metrics and the statements of all checkpoints, and the payload of those that --payload names. With
--key or --policy all of it is judged before it is put in place, and nothing is that is wrong: statements that
are forged or another's, a log that was replaced, or rolled back behind --head or behind the folder's own.
Without, bytes are compared with the store's own manifests, and `harness verify` judges. An interrupted fetch
goes on where it was when it is called again, and a folder that has a part gets what is new. Where the store
is and who may read it comes from the AWS_* environment variables (AWS_SKIP_SIGNATURE=true for a public
bucket). Needs `pip install 'harness[s3]'`. Exit code 0: fetched; 1: something is wrong; 4: evidence is
missing.
"""

from __future__ import annotations

import argparse
import shlex
from dataclasses import asdict
from pathlib import Path

from harness.commands import Outcome
from harness.commands.trust import add_heads, add_trust, require_own, required, trusted
from harness.format import leftovers
from harness.format.layout import RunFolder
from harness.stores.client import ObjectStore
from harness.stores.contents import parse_selection
from harness.stores.fetch import Fetched, fetch
from harness.stores.judged import Judge
from harness.words import human_bytes

EXAMPLE = "harness fetch s3://bucket/runs/tiny tiny --payload none --key alice.ed25519.pub"

_PATIENCE = 60
"""Seconds for which a failing request is tried again."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """From where, to where, and how much."""
    parser.add_argument("url", metavar="URL", help="s3://BUCKET/PREFIX, the checkpoint.store of the run")
    parser.add_argument(
        "folder", type=Path, metavar="DIR", help="folder of the run; made when it is not there"
    )
    parser.add_argument(
        "--payload",
        default="newest",
        metavar="WHICH",
        help="checkpoints to bring whole: newest (default), all, none, or steps: 100,200",
    )
    add_trust(parser)
    add_heads(parser, "is not put in place")


def run(arguments: argparse.Namespace) -> Outcome:
    """Fetch, and print what has come."""
    wanted = parse_selection(arguments.payload)
    require_own(arguments, arguments.folder)
    whom = required(arguments, arguments.url, "a head is signed") if arguments.head else trusted(arguments)
    judge = None if whom is None else Judge(whom, arguments.head, quiet=arguments.json)
    store = ObjectStore(arguments.url, patience=_PATIENCE)
    fetched = fetch(store, RunFolder(arguments.folder), wanted, judge=judge, quiet=arguments.json)
    document = {"folder": str(arguments.folder), **asdict(fetched)}
    return Outcome(document, "\n".join(_lines(fetched, arguments)))


def _lines(fetched: Fetched, arguments: argparse.Namespace) -> list[str]:
    why = "the store has another one, and a log that goes further"
    lines = [f"set aside   {name}: {why}" for name in fetched.superseded]
    if fetched.checkpoints:
        lines.append(f"whole       {', '.join(fetched.checkpoints)}  ({human_bytes(fetched.size)})")
    if fetched.statements:
        lines.append(f"statements  {', '.join(fetched.statements)}")
    lines += [f"left out    {name}: not in the store's log yet" for name in fetched.left_out]
    if fetched.cleared:
        lines.append(leftovers.in_words(fetched.cleared))
    if fetched.nothing:
        lines.append("nothing new")
    return [*lines, _judgement(fetched, arguments)]


def _judgement(fetched: Fetched, arguments: argparse.Namespace) -> str:
    """What was looked at, and what to run next."""
    told = fetched.judged
    if told is None:
        what = "no key and no policy was given, so nobody's signature was looked at"
        return f"not judged  {what}; next: harness verify {arguments.folder} --key PUB"
    signers = ", ".join(told["signers"])
    what = f"statements, lineage and log of {told['checkpoints']} checkpoints, signed by {signers}"
    trust = ["--policy", arguments.policy] if arguments.policy else ["--key", *arguments.key]
    again = shlex.join(map(str, ["harness", "verify", arguments.folder, *trust]))
    return f"judged      good: {what}, and each byte fetched; payload that was here before: {again}"
