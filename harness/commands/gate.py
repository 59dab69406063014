"""Let models through only if they verify: for CI, commit hooks and deployment.

Every checkpoint, run, export and prepared corpus below PATH is verified, and a file of weights that lies in
none of them is refused. Exit code 0: all of it is verified; 1: something is refused; 4: evidence is missing,
or there is nothing to verify. Keep the policy where those who add models cannot change it (docs/gates.md).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from harness.audit.verification import gate, text
from harness.audit.verification.gate import Passage
from harness.commands import Outcome
from harness.commands.trust import add_trust, required
from harness.errors import visible
from harness.terminal import style

EXAMPLE = "harness gate models --policy team.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """PATHs, and whom to trust."""
    parser.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="folders that hold models")
    add_trust(parser)


def run(arguments: argparse.Namespace) -> Outcome:
    """Verify all of it and print what is refused, and why."""
    whom = required(arguments, " ".join(map(str, arguments.paths)))
    passage = gate.examine(arguments.paths, whom, quiet=arguments.json)
    return Outcome(passage.document(), "\n".join(_lines(passage)), passage.exit_code)


def _lines(passage: Passage) -> Iterator[str]:
    for report in passage.reports:
        yield text.brief(report)
    for each in passage.refusals:
        word = style("refused", "red") if each.exit_code == 1 else style("cannot tell", "yellow")
        yield f"{word}  {visible(str(each.path))}: {visible(each.what)}"
    if not passage.reports and not passage.refusals:
        yield f"{style('cannot tell', 'yellow')}  there is no model to verify"
