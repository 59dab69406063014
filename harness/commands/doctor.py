"""Look at this machine, and at a config, before a job is queued: each line is ok, warn or bad.

Checks packages, launcher, devices, threads, limits, clock and signing key; for a config also world size,
batch, precision, run folder, store, disk space, data and trackers; with --policy, whether it accepts the key.
Changes nothing, but for a small object in the store, which it removes again. Exit code 1 when something is
bad.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from harness.commands import Outcome
from harness.errors import UsageError
from harness.terminal import Style, style
from harness.training.doctor import machine, one_config
from harness.training.doctor.machine import Check, Level

EXAMPLE = "harness doctor configs/tiny.yaml --world-size 2"

_COLOURS: dict[Level, Style] = {"ok": "green", "warn": "yellow", "bad": "red"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The config, if any, and how it is to be launched."""
    parser.add_argument("config", type=Path, nargs="?", metavar="CONFIG", help="YAML file of a run")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="for example run.dir=/scratch/run"
    )
    parser.add_argument(
        "--world-size",
        type=int,
        metavar="N",
        help="processes that the launch will have (default: train.world_size or 1)",
    )
    parser.add_argument(
        "--policy", type=Path, metavar="FILE", help="the policy that is to accept the checkpoints"
    )


def run(arguments: argparse.Namespace) -> Outcome:
    """Print every check."""
    if arguments.world_size is not None and arguments.world_size < 1:
        raise UsageError("--world-size must be greater than 0")
    checks = _checks(arguments)
    bad = any(check.level == "bad" for check in checks)
    document = {"good": not bad, "checks": [asdict(check) for check in checks]}
    return Outcome(document, "\n".join(map(_line, checks)), exit_code=1 if bad else 0)


def _checks(arguments: argparse.Namespace) -> list[Check]:
    planned: int | None = arguments.world_size
    if arguments.config is not None:
        checks = machine.machine(planned, training=True)
        return [
            *checks,
            *one_config.of_run(arguments.config, arguments.overrides, planned, arguments.policy),
        ]
    key, signer = machine.signing_key(None, None)
    rules = [] if arguments.policy is None else one_config.trusted(arguments.policy, signer, None)
    folder = machine.writable(Path.cwd(), "working folder")
    return [*machine.machine(planned, training=False), key, *rules, folder]


def _line(check: Check) -> str:
    label = style(f"{check.level:<4}", _COLOURS[check.level])
    remedy = f"; {check.remedy}" if check.remedy else ""
    return f"{label}  {check.name:<14} {check.text}{remedy}"
