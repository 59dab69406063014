"""One evaluation of one checkpoint: verified, asked, every example's result kept, the sum signed into it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

import harness
from harness import environment
from harness.audit import attest, permission
from harness.audit.folders import prepared
from harness.audit.folders.opening import OpenedCheckpoint
from harness.commands import Outcome
from harness.commands.attest import verified
from harness.commands.reexecute import config_folder
from harness.commands.trust import signer_of
from harness.errors import UsageError, visible
from harness.format import files, layout, moments
from harness.provenance import later
from harness.provenance.policy.rules import Policy
from harness.provenance.signers import Added

if TYPE_CHECKING:
    from harness.training.evaluation.examples import Assessment
    from harness.training.evaluation.generate import Decoding


@dataclass(frozen=True)
class Question:
    """What is asked, the same of every checkpoint, and who signs the answers."""

    examples: int
    """At most so many, of each of lm-eval's tasks."""
    chats: Path | None
    """The prepared corpus whose held-out chats are to be answered."""
    lm_eval: Sequence[str]
    """Tasks of lm-eval, defined in ``tasks``; with neither these nor chats, the held-out split."""
    tasks: Path | None
    new_tokens: int
    """Of the longest answer."""
    temperature: float
    seed: int
    """Of answers that are drawn."""
    bounds: Sequence[tuple[str, str, float]]
    """``least`` or ``most``, a measure, its bound."""
    base: Path | None
    """Folder of the runs' config; None where the statement's command says it."""
    items: Path | None
    """Where the single results go; None for a new file beside the run's others."""
    once: bool
    """Whether a statement that answers it already is enough."""
    signing_key: Path | None
    quiet: bool

    @property
    def decoding(self) -> Decoding:
        """How answers to chats are made."""
        from harness.training.evaluation.generate import Decoding

        return Decoding(self.new_tokens, self.temperature, self.seed)

    @property
    def tests(self) -> list[str]:
        """The bounds as statements name them."""
        return sorted(f"{name} at {word} {bound:g}" for word, name, bound in self.bounds)


def evaluate(folder: Path, question: Question, whom: Policy) -> Outcome:
    """Ask the checkpoint in ``folder``; exit code 1 when a measure is not what it must be.

    Raises `VerificationFailed` or `EvidenceIncomplete` for a checkpoint that ``whom`` does not vouch for,
    `UsageError` where a policy would not accept the result (`harness.audit.permission`), and
    what `assess`, `converse` and `run_tasks` of `harness.training.evaluation` raise.
    """
    signer, reason = signer_of(question.signing_key, folder)
    opened = verified(folder, whom, quiet=question.quiet)
    there = _there(opened, question) if question.once else None
    if there is not None:
        return _again(there, opened)
    asked = permission.require(opened, later.TEST_RESULT, signer, whom)
    found = _asked(opened, question)
    passed, failed = _judged(question.bounds, found.metrics)
    items, digest = _kept(question.items or _place(folder), found.items)
    predicate = _predicate(found, digest, question.examples)
    predicate |= {"result": "FAILED" if failed else "PASSED", "passedTests": passed, "failedTests": failed}
    added = attest.add(opened, later.TEST_RESULT, predicate, signer)
    document: dict[str, Any] = {
        "checkpoint": opened.checkpoint_id,
        "step": opened.statement.step_to,
        "procedure": found.procedure,
        "decoding": dict(found.decoding),
        "metrics": dict(found.metrics),
        "examples": len(found.items),
        "result": predicate["result"],
        "failed": failed,
        "items": str(items),
        "items_sha256": digest,
        "statement": str(added.path),
        "log": added.reason,
        "policy": asked,
        "there": False,
    }
    lines = [
        told(document),
        *(f"  failed     {text}" for text in failed),
        f"  items      {items}",
        f"  statement  {added.path}, signed by ed25519 {signer.ed25519_id[:16]}… ({reason})",
        f"  log        {added.reason}",
        f"  policy     {asked}",
    ]
    return Outcome(document, "\n".join(lines), exit_code=1 if failed else 0)


def told(document: Mapping[str, Any]) -> str:
    """Verdict and measures of an outcome of `evaluate`, in a line."""
    shown = "  ".join(f"{name} {value:.4f}" for name, value in document["metrics"].items())
    return visible(f"{document['result']}  {shown}  ({document['examples']} examples)")


def _asked(opened: OpenedCheckpoint, question: Question) -> Assessment:
    """The answer of the verified checkpoint."""
    from harness.training.evaluation import answers, examples, lm_eval_tasks

    limit, quiet = question.examples, question.quiet
    if question.tasks is not None:
        return lm_eval_tasks.run_tasks(opened, question.lm_eval, question.tasks, limit, quiet=quiet)
    if question.chats is not None:
        return answers.converse(opened, question.chats, limit, question.decoding, quiet=quiet)
    base = question.base or config_folder(opened.statement.predicate)
    return examples.assess(opened, base, limit, quiet=quiet)


def _identity(opened: OpenedCheckpoint, question: Question) -> tuple[str, str, Mapping[str, Any] | None]:
    """Procedure, hex sha256 of the suite, decoding: two evaluations that share them are the same one.

    The decoding is None where the suite decides it.
    """
    from harness.training.evaluation import answers, examples, lm_eval_tasks

    if question.tasks is not None:
        suite = lm_eval_tasks.suite_digest(question.tasks)
        return lm_eval_tasks.procedure(question.lm_eval), suite, None
    if question.chats is not None:
        suite = prepared.claimed(question.chats).subject_id
        return answers.PROCEDURE, suite, question.decoding.facts
    return examples.PROCEDURE, opened.statement.predicate["data"]["corpus_sha256"], {}


def _there(opened: OpenedCheckpoint, question: Question) -> Added | None:
    """The verified statement that answers the question already: the same examples, the same tests."""
    procedure, suite, decoding = _identity(opened, question)
    for each in opened.added:
        facts = each.statement.predicate
        made = facts.get("harness_evaluation")
        if each.statement.kind != later.TEST_RESULT or made is None or made["dataset"] is None:
            continue
        same = (
            made["procedure"]["name"] == procedure
            and made["dataset"]["sha256"] == suite
            and decoding in (None, made["decoding"])
            and made["procedure"]["settings"].get("limit") == question.examples
            and sorted([*facts.get("passedTests", ()), *facts.get("failedTests", ())]) == question.tests
        )
        if same:
            return each
    return None


def _again(there: Added, opened: OpenedCheckpoint) -> Outcome:
    """The statement that is there."""
    facts = there.statement.predicate
    evaluation = facts["harness_evaluation"]
    document = {
        "checkpoint": opened.checkpoint_id,
        "step": opened.statement.step_to,
        "procedure": evaluation["procedure"]["name"],
        "decoding": evaluation["decoding"],
        "metrics": {name: float(value) for name, value in evaluation["metrics"].items()},
        "examples": evaluation["examples"],
        "result": facts["result"],
        "failed": facts.get("failedTests", []),
        "items_sha256": evaluation["procedure"]["settings"]["items_sha256"],
        "statement": str(opened.folder / later.path_of(there.statement.name)),
        "there": True,
    }
    text = f"{told(document)}\n  statement  {document['statement']}, there already"
    return Outcome(document, text, exit_code=1 if facts["result"] == "FAILED" else 0)


def _judged(
    bounds: Sequence[tuple[str, str, float]], metrics: Mapping[str, float]
) -> tuple[list[str], list[str]]:
    """Which of the tests hold, and which do not."""
    verdicts: tuple[list[str], list[str]] = ([], [])
    for word, name, bound in bounds:
        if name not in metrics:
            raise UsageError(f"there is no measure {name}", remedy=f"there are {', '.join(metrics)}")
        holds = metrics[name] >= bound if word == "least" else metrics[name] <= bound
        verdicts[0 if holds else 1].append(f"{name} at {word} {bound:g}")
    return verdicts


def _place(folder: Path) -> Path:
    """A new file beside the run's other files, or beside a checkpoint that lies alone."""
    folder = files.real(folder)
    inside = folder.parent.name == layout.CHECKPOINTS
    root = folder.parent.parent / layout.EVALUATIONS if inside else folder.parent
    number = 0
    while (path := root / f"{folder.name}-{number}.jsonl").exists():
        number += 1
    return path


def _kept(path: Path, items: Sequence[Mapping[str, Any]]) -> tuple[Path, str]:
    """Write a line an example; returns where, and the sha256 of the file."""
    if path.exists():
        raise UsageError("is there already", where=str(path), remedy="name another file with --items")
    lines = [orjson.dumps({"example": number, **item}) + b"\n" for number, item in enumerate(items)]
    data = b"".join(lines)
    files.write_durable(path, data)
    return path, hashlib.sha256(data).hexdigest()


def _predicate(found: Assessment, items_sha256: str, limit: int) -> dict[str, Any]:
    suite = found.suite
    named = {"name": f"{suite.name}, {suite.split}", "digest": {"sha256": suite.sha256}}
    return {
        "configuration": [named] if suite.sha256 else [],
        "harness_evaluation": {
            "metrics": {name: repr(float(value)) for name, value in found.metrics.items()},
            "examples": len(found.items),
            "dataset": {"name": suite.name, "split": suite.split, "sha256": suite.sha256},
            "procedure": {
                "name": found.procedure,
                "version": harness.__version__,
                "settings": {**found.settings, "limit": limit, "items_sha256": items_sha256},
            },
            "decoding": dict(found.decoding),
            "environment": {
                name: value
                for name, value in environment.facts().items()
                if isinstance(value, str | int) or value is None
            },
            "created": moments.now(),
        },
    }
