"""Bring a run from an object store into a folder, to verify it there or to look at it.

Brings log, metrics and the statements of all checkpoints, and the payload of those that --payload names.
Every byte is compared with the manifests; who signed them is for `harness verify` to check, afterwards. An
interrupted fetch goes on where it was when it is called again, and a folder that has a part gets what is new.
Where the store is and who may read it comes from the AWS_* environment variables (AWS_SKIP_SIGNATURE=true for
a public bucket). Needs `pip install 'harness[s3]'`.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from harness.commands import Outcome
from harness.format import leftovers
from harness.format.layout import RunFolder
from harness.stores.client import ObjectStore
from harness.stores.contents import parse_selection
from harness.stores.fetch import Fetched, fetch
from harness.words import human_bytes

EXAMPLE = "harness fetch s3://bucket/runs/tiny tiny --payload none"

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


def run(arguments: argparse.Namespace) -> Outcome:
    """Fetch, and print what has come."""
    wanted = parse_selection(arguments.payload)
    store = ObjectStore(arguments.url, patience=_PATIENCE)
    fetched = fetch(store, RunFolder(arguments.folder), wanted, quiet=arguments.json)
    document = {"folder": str(arguments.folder), **asdict(fetched)}
    return Outcome(document, "\n".join(_lines(fetched, arguments.folder)))


def _lines(fetched: Fetched, folder: Path) -> list[str]:
    why = "the store has another one, and a log that goes further"
    lines = [f"set aside   {name}: {why}" for name in fetched.superseded]
    if fetched.checkpoints:
        lines.append(f"whole       {', '.join(fetched.checkpoints)}  ({human_bytes(fetched.size)})")
    if fetched.statements:
        lines.append(f"statements  {', '.join(fetched.statements)}")
    if fetched.cleared:
        lines.append(leftovers.in_words(fetched.cleared))
    if fetched.nothing:
        lines.append("nothing new")
    return [*lines, f"{folder} is not verified yet: harness verify {folder} --key PUB"]
