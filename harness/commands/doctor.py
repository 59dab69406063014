"""Look at this machine, and at a config, before a job is queued: each line is ok, warn or bad.

Checks packages, launcher, devices, threads, limits, clock and signing key, and for a config also batch, run
folder, disk space and trackers. Changes nothing. Exit code 1 when something is bad.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from harness.commands import Outcome
from harness.terminal import Style, style
from harness.training import checkup
from harness.training.checkup import Check, Level

EXAMPLE = "harness doctor configs/tiny.yaml --world-size 2"

_COLOURS: dict[Level, Style] = {"ok": "green", "warn": "yellow", "bad": "red"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The config, if any, and how it is to be launched."""
    parser.add_argument("config", type=Path, nargs="?", metavar="CONFIG", help="YAML file of a run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example run.dir=/scratch/run")
    parser.add_argument(
        "--world-size", type=int, metavar="N", help="processes that the launch will have (default: 1)"
    )


def run(arguments: argparse.Namespace) -> Outcome:
    """Print every check."""
    checks = checkup.run(arguments.config, arguments.overrides, arguments.world_size)
    bad = any(check.level == "bad" for check in checks)
    document = {"good": not bad, "checks": [asdict(check) for check in checks]}
    return Outcome(document, "\n".join(map(_line, checks)), exit_code=1 if bad else 0)


def _line(check: Check) -> str:
    label = style(f"{check.level:<4}", _COLOURS[check.level])
    remedy = f"; {check.remedy}" if check.remedy else ""
    return f"{label}  {check.name:<14} {check.text}{remedy}"
