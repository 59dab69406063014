"""The graph of what came from what: checkpoints, launches and resumes, runs, data sets, tokenizers, code.

PATH is a run folder, or a checkpoint folder, which is then drawn alone with its parent. --with adds the runs
that it began with, exported folders and prepared corpora; a run that is not given is drawn as absent. Pruned,
damaged and non-finite checkpoints are drawn as such. With --key or --policy the statements are authenticated
first, and a folder that fails is drawn by its name only; then exit code 1 says that something is wrong, 4
that evidence is missing. Without, the output says that nothing was verified.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.audit.lineage import html, text
from harness.audit.lineage import picture as lineage
from harness.audit.lineage.fold import folded
from harness.audit.lineage.picture import Picture
from harness.commands import Outcome
from harness.commands.trust import add_ancestors, add_trust, trusted
from harness.terminal import json_text

EXAMPLE = "harness lineage runs/tiny --format html > lineage.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """PATH, the format, and whom to trust."""
    parser.add_argument("path", type=Path, metavar="PATH", help="run folder or checkpoint folder")
    parser.add_argument(
        "--format",
        choices=("text", "json", "html", "mermaid"),
        default="text",
        help="text: a tree, newest on top; html: one page that needs nothing else (default: %(default)s)",
    )
    parser.add_argument(
        "--every",
        action="store_true",
        help="draw each checkpoint; without, the middle of a long stretch is one node where nothing else "
        "happened (json has each in any case)",
    )
    add_trust(parser)
    add_ancestors(parser)


def run(arguments: argparse.Namespace) -> Outcome:
    """Read, check when a key or a policy was given, draw."""
    picture = lineage.read(arguments.path, trusted(arguments), arguments.beside)
    if arguments.json:
        return Outcome(picture.document(), "", picture.exit_code)
    return Outcome({}, _drawn(picture, arguments), picture.exit_code)


def _drawn(picture: Picture, arguments: argparse.Namespace) -> str:
    if arguments.format == "json":
        return json_text(picture.document(), indent=1)
    shown = picture if arguments.every else folded(picture)
    if arguments.format == "html":
        return html.render(shown, picture.graph)
    return text.mermaid(shown) if arguments.format == "mermaid" else text.text(shown)
