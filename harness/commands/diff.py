"""Compare two checkpoints, or two runs at every step that both have: what differs, and since when.

Tensors are compared by the bytes in their files: model, optimizer, and the generators' states (rng). What
differs is measured: elements with other bits, the largest difference in ULP, and relative L2. Then the
statements: config key by key, code, data, environment, launch, determinism, kernels, metrics. What only tells
two runs apart (ids, folders, keys, command, parents, log, clock) is listed as identity.

Tensors alone decide the exit code. 0: every tensor of every common step is equal, bit for bit, even when the
statements differ. 1: some tensor differs, or one side lacks it. 4: no step is common, or payload is missing.
With --key or --policy both sides are verified first, payload included, and nothing is compared when one is
not good. Without, the first line says that nothing was verified.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.audit.diff import comparison, text
from harness.commands import Outcome
from harness.commands.trust import add_trust, trusted
from harness.errors import UsageError
from harness.terminal import progress

EXAMPLE = "harness diff runs/tiny runs/twin"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A and B."""
    parser.add_argument("a", type=Path, metavar="A", help="run folder or checkpoint folder")
    parser.add_argument("b", type=Path, metavar="B", help="another one of the same kind")
    parser.add_argument(
        "--elements",
        type=int,
        default=comparison.ELEMENTS,
        metavar="N",
        help="elements of a differing tensor to measure in ULP and L2 (default: %(default)s); "
        "differing elements are always all counted",
    )
    add_trust(parser)


def run(arguments: argparse.Namespace) -> Outcome:
    """Compare and print."""
    if arguments.elements < 1:
        raise UsageError("--elements is not positive", where=str(arguments.elements))
    planned = comparison.plan(arguments.a, arguments.b)
    whom = trusted(arguments)
    found = None if whom is None else comparison.verified(planned, whom, quiet=arguments.json)
    with progress(planned.size, "B", "diff", quiet=arguments.json) as bar:
        result = comparison.compare(planned, arguments.elements, bar.advance, found)
    return Outcome(result.document(), text.render(result), 0 if result.equal else 1)
