"""What made this checkpoint, in one screen: run, parent, launch, code, data, environment, determinism, state.

CKPT is a checkpoint folder, or a run folder, whose newest checkpoint is then shown. With --key or --policy
every check but hashing the payload is made first, and nothing is shown of a folder that fails. Without, the
first line says that nothing was verified.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.audit import show, story
from harness.commands import Outcome
from harness.commands.trust import add_trust, trusted

EXAMPLE = "harness show runs/tiny/checkpoints/step-00000500 --key alice.ed25519.pub"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CKPT and whom to trust."""
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="checkpoint folder or run folder")
    add_trust(parser)


def run(arguments: argparse.Namespace) -> Outcome:
    """Read, check when a key or a policy was given, print."""
    folder = story.newest(arguments.checkpoint)
    shown = story.read(folder, trusted(arguments))
    newest_of = None if folder == arguments.checkpoint else str(arguments.checkpoint)
    return Outcome(show.document(shown, newest_of), show.render(shown, newest_of))
