"""Start the run in run.dir, or continue it when that folder holds a checkpoint.

The same command in a requeue loop: exit code 75 means interrupted, saved, start me again. Launch it bare
for one process; by `torchrun --nproc-per-node N -m harness train CONFIG` or by
`accelerate launch -m harness train CONFIG` for more.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from harness import config, environment, signals
from harness.commands import Outcome
from harness.errors import HarnessError, Interrupted, UsageError

EXAMPLE = "harness train configs/tiny.yaml train.steps=20 run.dir=runs/try"

_ACCEPTABLE = ("config", "data", "tokenizer", "code", "policy", "metrics", "checkpoints")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The config, overrides, and the answers to a refused resume."""
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML file of the run")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="for example train.steps=20"
    )
    parser.add_argument(
        "--accept",
        metavar="WHAT,…",
        default="",
        help=f"continue although these differ, signed into the lineage: {', '.join(_ACCEPTABLE)}",
    )
    parser.add_argument("--reason", metavar="TEXT", help="why, for --accept")


def run(arguments: argparse.Namespace) -> Outcome:
    """Train; an unexpected error becomes one line, with its traceback in events/."""
    accept = [word for word in arguments.accept.split(",") if word]
    unknown = sorted(set(accept) - set(_ACCEPTABLE))
    if unknown:
        raise UsageError(
            f"--accept does not know {', '.join(unknown)}", remedy=f"use {', '.join(_ACCEPTABLE)}"
        )
    if accept and not arguments.reason:
        raise UsageError("--accept needs --reason TEXT", remedy="the reason is signed into the lineage")
    if arguments.reason and not accept:
        raise UsageError("--reason is for --accept", remedy="say what is accepted, or leave --reason out")
    loaded = config.load(arguments.config, arguments.overrides)
    environment.require_training()
    # Torch takes seconds to import, in which the scheduler may want the job back.
    with signals.listening(numbers=signals.SCHEDULER_SIGNALS) as stop:
        from harness.training import loop
        from harness.training.ranks import failure

        try:
            result = loop.train(
                loaded, accept=accept, reason=arguments.reason, quiet=arguments.json, stop=stop
            )
        except HarnessError as error:
            if isinstance(error, Interrupted):
                signals.ignore()
            failure.report(error, loaded.settings.run.dir)
            raise
        except (Exception, SystemExit) as error:  # a task that leaves with 0 has not finished the run
            explained = failure.explain(error, loaded.settings.run.dir)
            failure.report(explained, loaded.settings.run.dir)
            raise explained from error
    return Outcome({}, "", silent=True) if result is None else Outcome(asdict(result), "")
