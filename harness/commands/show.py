"""What made this checkpoint, in one screen: run, parent, launch, code, data, environment, determinism, state.

CKPT is a checkpoint folder, or a run folder, whose newest checkpoint is then shown. With --key or --policy
every check but hashing the payload is made first, and nothing is shown of a folder that fails. Without, the
first line says that nothing was verified.

--rerun DIR tells how to make the checkpoint again: it writes the config, the packages and a script into DIR,
and prints the commands, what to expect, at which tier of repeatability, and what is not on record. With --key
or --policy also how to repeat the evaluations that were signed into it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from harness.audit import rerun, show
from harness.audit.folders import exported, story
from harness.commands import Outcome
from harness.commands.trust import add_trust, trusted
from harness.errors import UsageError
from harness.format import files, layout

EXAMPLE = "harness show runs/tiny/checkpoints/step-00000060 --key alice.ed25519.pub"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CKPT and whom to trust."""
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="checkpoint folder or run folder")
    parser.add_argument("--rerun", type=Path, metavar="DIR", help="write what a rerun takes into DIR")
    add_trust(parser)


def run(arguments: argparse.Namespace) -> Outcome:
    """Read, check when a key or a policy was given, print."""
    if exported.is_export(arguments.checkpoint):
        remedy = "harness verify checks it; name the checkpoint that it was made of"
        raise UsageError("is an export, and no checkpoint", where=str(arguments.checkpoint), remedy=remedy)
    folder = story.newest(arguments.checkpoint)
    shown = story.read(folder, trusted(arguments))
    if arguments.rerun is not None:
        return _rerun(shown, arguments.rerun)
    newest_of = None if folder == arguments.checkpoint else str(arguments.checkpoint)
    return Outcome(show.document(shown, newest_of), show.render(shown, newest_of))


def _rerun(shown: story.Story, out: Path) -> Outcome:
    found = rerun.rerun(shown.statement, str(out), shown.added)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError("is not an empty folder", where=str(out), remedy="name a new one")
    layout.require_unsigned(out)
    files.write_together(out, {name: text.encode() for name, text in found.files.items()})
    document: dict[str, Any] = {
        "checkpoint": str(shown.folder),
        "verified": shown.verified,
        "not_on_record": list(found.lacking),
        "steps": [{"what": what, "command": command} for what, command in found.steps],
        "files": {name: str(out / name) for name in found.files},
        "expected": dict(found.expected),
        "could_vary": show.could_vary(shown),
        "repeatability": show.repeatability(shown),
    }
    varying = [f"could vary: {each}" for each in document["could_vary"]]
    lines = [shown.trust, rerun.render(found), *show.tier_to_expect(shown), *varying]
    return Outcome(document, "\n".join(lines))
