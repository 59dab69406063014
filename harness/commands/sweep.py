"""Run a config with several seeds, and variants of it, then report on all of them.

Each member is a run of its own under the sweep's folder (RUN.DIR-seeds, or --out): `seed-0`, or `wide-seed-0`
for `--variant wide`. The same command continues: what is complete stays, a member that was killed resumes
alone. On a scheduler, give each array job one member: `--member "$SLURM_ARRAY_TASK_ID"`; without it,
everything runs as processes of this machine.
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

from harness import config, environment
from harness.commands import Outcome
from harness.commands.report import write_report
from harness.errors import EnvironmentFault, TrainingFailed, UsageError
from harness.format import layout
from harness.provenance.policy.rules import from_keys
from harness.provenance.signing import keys
from harness.provenance.signing.keys import Signer
from harness.report import claim_file
from harness.settings import Settings
from harness.sweeps import members, plan, processes
from harness.sweeps.processes import Job
from harness.sweeps.register import Register
from harness.terminal import progress, tell
from harness.training.beginning import own_policy

EXAMPLE = "harness sweep configs/tiny.yaml --seeds 0..4 --variant base --variant wide model.width=128"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The config, what varies, and how to run it."""
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML file of the run")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="for every member: train.steps=20"
    )
    parser.add_argument("--seeds", required=True, metavar="0..4", help="both ends included; or 1,5,9")
    parser.add_argument(
        "--variant",
        action="append",
        nargs="+",
        default=[],
        metavar=("NAME", "key=value"),
        help="another config to run with each seed; without any, the config as it is",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the sweep")
    parser.add_argument("--at-once", type=_positive, default=1, metavar="N", help="members at a time (1)")
    parser.add_argument("--processes", type=_positive, default=1, metavar="N", help="ranks of a member (1)")
    parser.add_argument("--attempts", type=_positive, default=3, metavar="N", help="starts of a member (3)")
    parser.add_argument(
        "--member", type=int, metavar="K", help="run only member K, in the foreground; from 0"
    )
    parser.add_argument(
        "--claims", type=Path, metavar="FILE", help="what to check in the report (docs/method.md)"
    )
    parser.add_argument(
        "--plan", action="store_true", help="list the members and how far they are; run nothing"
    )


def run(arguments: argparse.Namespace) -> Outcome:
    """Plan, run, report; exit code 1 when a member failed."""
    seeds = members.parse_seeds(arguments.seeds)
    variants = members.parse_variants(arguments.variant)
    base = config.load(arguments.config, arguments.overrides).settings
    folder = arguments.out or base.run.dir.with_name(f"{base.run.dir.name}-seeds")
    layout.require_unsigned(folder)
    wanted = members.members(folder, seeds, variants, arguments.overrides)
    jobs = [
        Job(
            member,
            processes.command(arguments.config, member, arguments.processes),
            members.resolved(arguments.config, member).settings.train.steps,
        )
        for member in wanted
    ]
    if arguments.plan:
        return _listed(folder, jobs)
    environment.require_training()
    key, reason = keys.signing_key_path(base.signing.key, folder)
    for member in wanted:
        settings = members.resolved(arguments.config, member).settings
        own_policy.planned(settings, partial(_signer, settings))
    digest = None if arguments.claims is None else claim_file.digest(arguments.claims)
    planned = plan.enter(folder, arguments.config, wanted, digest)
    if arguments.member is not None:
        return _one(jobs, arguments.member)

    def say(text: str) -> None:
        if not arguments.json:
            tell(text, sys.stdout)

    say(f"{len(jobs)} members in {folder}, {arguments.at_once} at a time; signed with {reason}")
    for text in additions(planned):
        say(text)
    with progress(sum(job.steps for job in jobs), "steps", "sweep", quiet=arguments.json) as bar:
        ended = processes.run(jobs, at_once=arguments.at_once, attempts=arguments.attempts, say=say, bar=bar)
    failed = [one for one in ended if one.failure is not None]
    trust = from_keys(keys.public_keys(keys.load_signer(key)))
    try:
        report = write_report([folder], folder / "report", trust, arguments.claims)
    except UsageError as error:
        if len(failed) < len(ended):
            raise
        report = Outcome({}, f"no report: {error}")  # no member has begun, for the reason that is told below
    document: dict[str, Any] = {
        "folder": str(folder),
        "members": [
            {"name": one.member.name, "attempts": one.attempts, "failure": one.failure} for one in ended
        ],
        "report": report.document,
    }
    lines = [report.text]
    if failed:
        lines.append(
            f"{len(failed)} of {len(ended)} members are not complete: "
            f"{failed[0].member.name}, {failed[0].failure}"
        )
    return Outcome(document, "\n".join(lines), exit_code=1 if failed else report.exit_code)


def _signer(settings: Settings) -> Signer:
    """Who signs for the member with these ``settings``."""
    path, _ = keys.signing_key_path(settings.signing.key, settings.run.dir)
    return keys.load_signer(path)


def additions(planned: Register) -> list[str]:
    """What was added to the plan after its first version."""
    return [
        f"planned {one.created}, when {one.finished} members had finished: seeds "
        f"{', '.join(map(str, one.seeds))}; variants {', '.join(name or 'none' for name in one.variants)}"
        for one in planned.plans[1:]
    ]


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return int(text)


def _listed(folder: Path, jobs: list[Job]) -> Outcome:
    rows = [(number, job.member, members.reached(job.member), job.steps) for number, job in enumerate(jobs)]
    document = {
        "folder": str(folder),
        "members": [
            {
                "member": number,
                "name": member.name,
                "step": step,
                "steps": steps,
                "overrides": [*member.overrides],
            }
            for number, member, step, steps in rows
        ],
    }
    width = max(len(job.member.name) for job in jobs)
    text = "\n".join(
        f"{number:>4}  {member.name:<{width}}  step {step:,} of {steps:,}"
        for number, member, step, steps in rows
    )
    return Outcome(document, text)


def _one(jobs: list[Job], number: int) -> Outcome:
    """Become member ``number``: its exit code, signals and screen are then those of `harness train`."""
    if not 0 <= number < len(jobs):
        raise UsageError(f"there is no member {number}", where="--member", remedy=f"0 to {len(jobs) - 1}")
    job = jobs[number]
    job.member.folder.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    try:
        os.execv(job.command[0], job.command)
    except OSError as error:
        remedy = "check the installation of Python that runs harness"
        what = f"cannot start: {error.strerror}"
        raise EnvironmentFault(what, where=job.command[0], remedy=remedy) from error
    raise TrainingFailed("unreachable")
