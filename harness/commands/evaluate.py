"""Evaluate checkpoints on the held-out split, keep every example's result, and sign what came out.

PATH is a checkpoint, a run (its newest checkpoint, or that of --step) or a sweep (those of its members). Each
checkpoint is verified first, every byte, and the policy that is given, else the one that the run was made
under, must accept the signer. Config, data and code must be those of its statement. With --chats
the last answer of each held-out chat of a prepared corpus is generated and compared; with --lm-eval tasks of
EleutherAI's lm-eval are run. The measures go into a signed test-result statement in CKPT/provenance/, with
the sha256 of the file that holds the results of the single examples (JSON lines; evaluations/ of the run
folder, or --items). --at-least and --at-most make it a test that can fail.

Of a sweep, or of several PATHs, what has the same evaluation signed already is left as it is, so the same
command goes on where it was stopped; one that fails is named, and the others go on. Exit code 1 when a test
failed or a checkpoint is wrong, else that of the first failure.
"""

from __future__ import annotations

import argparse
import math
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness import environment
from harness.commands import Outcome, evaluation
from harness.commands.attest import UNVERIFIED
from harness.commands.evaluation import Question
from harness.commands.trust import add_signing_key, add_trust, required
from harness.errors import (
    EvidenceIncomplete,
    HarnessError,
    TrainingFailed,
    UsageError,
    storage_fault,
    visible,
)
from harness.format import layout
from harness.format.layout import RunFolder
from harness.provenance.policy.rules import Policy
from harness.sweeps import register
from harness.terminal import tell

EXAMPLE = "harness evaluate runs/tiny/checkpoints/step-00000060 --key alice.ed25519.pub alice.p256.pub"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The checkpoints, how much to look at, what must hold, who signs, whom to trust."""
    parser.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="checkpoint, run or sweep folder")
    parser.add_argument("--step", type=int, metavar="N", help="of runs: this checkpoint, not the newest")
    parser.add_argument("--examples", type=int, default=256, metavar="N", help="held-out samples (256)")
    parser.add_argument(
        "--chats", type=Path, metavar="CORPUS", help="generate the answers of this corpus' held-out chats"
    )
    parser.add_argument(
        "--lm-eval", nargs="+", default=[], metavar="TASK", help="tasks of lm-eval, defined in --tasks"
    )
    parser.add_argument("--tasks", type=Path, metavar="DIR", help="folder of lm-eval's YAML files and data")
    parser.add_argument("--new-tokens", type=int, default=64, metavar="N", help="longest answer (64)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0: always the likeliest token (0)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of answers that are drawn (0)")
    parser.add_argument(
        "--folder", type=Path, metavar="DIR", help="folder of the run's config (the one it was trained with)"
    )
    for word in ("least", "most"):
        parser.add_argument(
            f"--at-{word}", action="append", default=[], metavar="METRIC=VALUE", help="fails otherwise"
        )
    parser.add_argument(
        "--once",
        action="store_true",
        help="do nothing when the same evaluation is signed there already (of several checkpoints: always)",
    )
    parser.add_argument("--items", type=Path, metavar="FILE", help="where the single results go")
    add_signing_key(parser)
    add_trust(parser)


def run(arguments: argparse.Namespace) -> Outcome:
    """Verify, evaluate, keep, sign; exit code 1 when a measure is not what it must be."""
    question = _question(arguments)
    members = [member for path in arguments.paths for member in _members(path)]
    if arguments.step is not None and not all(member.is_run for member in members):
        raise UsageError("--step chooses a checkpoint of runs", remedy="name runs, or leave it out")
    whom = required(arguments, " ".join(map(str, arguments.paths)), UNVERIFIED)
    environment.require_training()
    if len(arguments.paths) == 1 and not members[0].of_sweep:
        return evaluation.evaluate(members[0].checkpoint(arguments.step), question, whom)
    if question.items is not None:
        raise UsageError("--items names one file", remedy="leave it out, or name one checkpoint")
    return _each(members, arguments.step, replace(question, once=True), whom)


@dataclass(frozen=True)
class _Member:
    """One of several to evaluate."""

    path: Path
    is_run: bool
    of_sweep: bool

    def checkpoint(self, step: int | None) -> Path:
        """The folder to evaluate. Raises `EvidenceIncomplete` when the run has none."""
        if not self.is_run:
            return self.path
        run = RunFolder(self.path)
        complete = [each for each in run.complete() if step is None or each == run.checkpoint(step)]
        if not complete:
            which = "" if step is None else f" of step {step}"
            remedy = "train it to there first" if step is None else "choose another --step"
            raise EvidenceIncomplete(
                f"the run has no complete checkpoint{which}", where=str(self.path), remedy=remedy
            )
        return complete[-1]


def _members(path: Path) -> Iterator[_Member]:
    planned = register.read(path)
    if planned is None:
        yield _Member(path, layout.kind_of(path) == "run", of_sweep=False)
    else:
        for name in planned.names:
            yield _Member(path / name, is_run=True, of_sweep=True)


@dataclass(frozen=True)
class _Answer:
    """How a member came out."""

    member: _Member
    outcome: Outcome | None
    """None when there is no evaluation."""
    failure: str | None
    """What is wrong, with the evaluation or in its place; None when nothing is."""
    exit_code: int

    @property
    def line(self) -> str:
        """For the screen."""
        if self.outcome is None:
            return str(self.failure)
        facts = self.outcome.document
        there = "there already: " if facts["there"] else ""
        return f"step {facts['step']:,}  {there}{evaluation.told(facts)}"

    def document(self) -> dict[str, Any]:
        """As plain JSON."""
        return {
            "path": str(self.member.path),
            "exit_code": self.exit_code,
            "failure": self.failure,
            "evaluation": None if self.outcome is None else self.outcome.document,
        }


def _each(members: Sequence[_Member], step: int | None, question: Question, whom: Policy) -> Outcome:
    """All of ``members``, one after the other, and what failed once more at the end."""
    answers = []
    for number, member in enumerate(members, start=1):
        answer = _answered(member, step, question, whom)
        answers.append(answer)
        if not question.quiet:
            tell(visible(f"{number} of {len(members)}  {member.path}  {answer.line}"), sys.stdout)
    failed = [each for each in answers if each.exit_code]
    codes = [each.exit_code for each in failed]
    facts = [each.outcome.document for each in answers if each.outcome is not None]
    there = sum(each["there"] for each in facts)
    lines = [f"{len(facts) - there} evaluated, {there} there already, {len(failed)} failed"]
    lines += [visible(f"  failed  {each.member.path}: {each.failure}") for each in failed]
    steps = sorted({each["step"] for each in facts})
    if len(steps) > 1:
        lines.append(f"  not all of one step: {', '.join(f'{each:,}' for each in steps)}")
    document = {
        "members": [each.document() for each in answers],
        "evaluated": len(facts) - there,
        "there": there,
        "failed": len(failed),
    }
    return Outcome(document, "\n".join(lines), exit_code=1 if 1 in codes else next(iter(codes), 0))


def _answered(member: _Member, step: int | None, question: Question, whom: Policy) -> _Answer:
    """The evaluation of ``member``, or why there is none; the others go on."""
    try:
        outcome = evaluation.evaluate(member.checkpoint(step), question, whom)
    except HarnessError as error:
        return _Answer(member, None, str(error), error.exit_code)
    except OSError as error:
        fault = storage_fault(error, "evaluating", member.path)
        return _Answer(member, None, str(fault), fault.exit_code)
    except Exception as error:  # a task is the user's own code
        traceback.print_exc()
        return _Answer(member, None, f"{type(error).__name__}: {error}", TrainingFailed.exit_code)
    failure = "; ".join(outcome.document["failed"]) or None
    return _Answer(member, outcome, failure, outcome.exit_code)


def _question(arguments: argparse.Namespace) -> Question:
    """What the arguments ask. Raises `UsageError` for what does not go together."""
    if arguments.examples < 1 or arguments.new_tokens < 1:
        raise UsageError("--examples and --new-tokens must be positive")
    if not 0 <= arguments.temperature < math.inf or arguments.seed < 0:
        raise UsageError("--temperature and --seed must not be negative")
    if bool(arguments.lm_eval) != (arguments.tasks is not None) or (arguments.lm_eval and arguments.chats):
        raise UsageError("--lm-eval and --tasks go together, and without --chats")
    bounds = [
        (word, *_bound(text)) for word in ("least", "most") for text in getattr(arguments, f"at_{word}")
    ]
    return Question(
        examples=arguments.examples,
        chats=arguments.chats,
        lm_eval=arguments.lm_eval,
        tasks=arguments.tasks,
        new_tokens=arguments.new_tokens,
        temperature=arguments.temperature,
        seed=arguments.seed,
        bounds=bounds,
        base=arguments.folder,
        items=arguments.items,
        once=arguments.once,
        signing_key=arguments.signing_key,
        quiet=arguments.json,
    )


def _bound(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError as error:
        raise UsageError(f"{text!r} is no METRIC=VALUE", remedy="for example accuracy=0.9") from error
