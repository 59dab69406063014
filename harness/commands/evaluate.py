"""Evaluate a checkpoint on the held-out split, keep every example's result, and sign what came out.

The checkpoint is verified first, every byte. Config, data and code must be those of its statement. With
--chats the last answer of each held-out chat of a prepared corpus is generated and compared; with --lm-eval
tasks of EleutherAI's lm-eval are run. The measures go into a signed test-result statement in
CKPT/provenance/, with the sha256 of the file that holds the results of the single examples (JSON lines;
evaluations/ of the run folder, or --items). --at-least and --at-most make it a test that can fail.
"""

from __future__ import annotations

import argparse
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

import harness
from harness import environment
from harness.audit import attest, prepared
from harness.commands import Outcome
from harness.commands.attest import verified
from harness.commands.reexecute import config_folder
from harness.commands.trust import add_trust, trusted
from harness.errors import UsageError
from harness.format import files, layout
from harness.provenance import keys, later
from harness.provenance.verifier import Added

if TYPE_CHECKING:
    from harness.training.assess import Assessment

EXAMPLE = "harness evaluate runs/tiny/checkpoints/step-00000060 --key alice.ed25519.pub alice.p256.pub"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The checkpoint, how much to look at, what must hold, who signs, whom to trust."""
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="checkpoint folder")
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
        "--folder", type=Path, help="folder of the run's config (the one it was trained with)"
    )
    for word in ("least", "most"):
        parser.add_argument(
            f"--at-{word}", action="append", default=[], metavar="METRIC=VALUE", help="fails otherwise"
        )
    parser.add_argument(
        "--once", action="store_true", help="do nothing when the same evaluation is signed there already"
    )
    parser.add_argument("--items", type=Path, metavar="FILE", help="where the single results go")
    parser.add_argument("--signing-key", type=Path, metavar="KEY", help="private key (default: yours)")
    add_trust(parser)


def run(arguments: argparse.Namespace) -> Outcome:
    """Verify, evaluate, keep, sign; exit code 1 when a measure is not what it must be."""
    folder: Path = arguments.checkpoint
    if layout.kind_of(folder) != "checkpoint":
        raise UsageError("is a run folder", where=str(folder), remedy="name one of its checkpoints")
    if arguments.examples < 1 or arguments.new_tokens < 1:
        raise UsageError("--examples and --new-tokens must be positive")
    if not 0 <= arguments.temperature < math.inf or arguments.seed < 0:
        raise UsageError("--temperature and --seed must not be negative")
    if bool(arguments.lm_eval) != (arguments.tasks is not None) or (arguments.lm_eval and arguments.chats):
        raise UsageError("--lm-eval and --tasks go together, and without --chats")
    bounds = [
        (word, *_bound(text)) for word in ("least", "most") for text in getattr(arguments, f"at_{word}")
    ]
    environment.require_training()
    from harness.training import assess, converse, lm_eval_tasks
    from harness.training.generate import Decoding

    decoding = Decoding(arguments.new_tokens, arguments.temperature, arguments.seed)
    path, reason = keys.signing_key_path(arguments.signing_key, folder)
    signer = keys.load_signer(path)
    opened = verified(folder, trusted(arguments), quiet=arguments.json)
    if arguments.lm_eval:
        asked = Asked(
            lm_eval_tasks.procedure(arguments.lm_eval), lm_eval_tasks.suite_digest(arguments.tasks), None
        )
    elif arguments.chats is None:
        asked = Asked(assess.PROCEDURE, opened.statement.predicate["data"]["corpus_sha256"], {})
    else:
        asked = Asked(converse.PROCEDURE, prepared.claimed(arguments.chats).subject_id, decoding.facts)
    tests = sorted(f"{name} at {word} {bound:g}" for word, name, bound in bounds)
    there = asked.among(opened.added, arguments.examples, tests) if arguments.once else None
    if there is not None:
        return _again(there, folder)
    limit, quiet = arguments.examples, arguments.json
    if arguments.lm_eval:
        found = lm_eval_tasks.run_tasks(opened, arguments.lm_eval, arguments.tasks, limit, quiet=quiet)
    elif arguments.chats is None:
        base = arguments.folder or config_folder(opened.statement.predicate)
        found = assess.assess(opened, base, limit, quiet=quiet)
    else:
        found = converse.converse(opened, arguments.chats, limit, decoding, quiet=quiet)
    passed, failed = _judged(bounds, found.metrics)
    items, digest = _kept(arguments.items or _place(folder), found.items)
    predicate = _predicate(found, digest, limit)
    predicate |= {"result": "FAILED" if failed else "PASSED", "passedTests": passed, "failedTests": failed}
    added = attest.add(opened, later.TEST_RESULT, predicate, signer)
    document: dict[str, Any] = {
        "checkpoint": opened.checkpoint_id,
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
    }
    shown = "  ".join(f"{name} {value:.4f}" for name, value in found.metrics.items())
    lines = [
        f"{predicate['result']}  {shown}  ({len(found.items)} examples)",
        *(f"  failed     {text}" for text in failed),
        f"  items      {items}",
        f"  statement  {added.path}, signed by ed25519 {signer.ed25519_id[:16]}… ({reason})",
        f"  log        {added.reason}",
    ]
    return Outcome(document, "\n".join(lines), exit_code=1 if failed else 0)


@dataclass(frozen=True)
class Asked:
    """What makes two evaluations of a checkpoint the same one."""

    procedure: str
    suite_sha256: str | None
    decoding: Mapping[str, Any] | None
    """None when the suite says how."""

    def among(self, added: Sequence[Added], limit: int, tests: Sequence[str]) -> Added | None:
        """The verified statement that answers this, of at most ``limit`` examples and the same ``tests``."""
        for each in added:
            facts = each.statement.predicate
            told = facts.get("harness_evaluation")
            if each.statement.kind != later.TEST_RESULT or told is None or told["dataset"] is None:
                continue
            same = (
                told["procedure"]["name"] == self.procedure
                and told["dataset"]["sha256"] == self.suite_sha256
                and self.decoding in (None, told["decoding"])
                and told["procedure"]["settings"].get("limit") == limit
                and sorted([*facts.get("passedTests", ()), *facts.get("failedTests", ())]) == tests
            )
            if same:
                return each
        return None


def _again(there: Added, folder: Path) -> Outcome:
    """The statement that is there."""
    facts = there.statement.predicate
    told = facts["harness_evaluation"]
    document = {
        "procedure": told["procedure"]["name"],
        "decoding": told["decoding"],
        "metrics": {name: float(value) for name, value in told["metrics"].items()},
        "examples": told["examples"],
        "result": facts["result"],
        "failed": facts.get("failedTests", []),
        "items_sha256": told["procedure"]["settings"]["items_sha256"],
        "statement": str(folder / later.path_of(there.statement.name)),
        "there": True,
    }
    text = f"{there.statement.summary}  ({told['examples']} examples)\n  statement  {document['statement']}"
    return Outcome(document, f"{text}, there already", exit_code=1 if facts["result"] == "FAILED" else 0)


def _bound(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError as error:
        raise UsageError(f"{text!r} is no METRIC=VALUE", remedy="for example accuracy=0.9") from error


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
    inside = folder.resolve().parent.name == layout.CHECKPOINTS
    root = folder.resolve().parent.parent / layout.EVALUATIONS if inside else folder.resolve().parent
    number = 0
    while (path := root / f"{folder.resolve().name}-{number}.jsonl").exists():
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
            "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        },
    }
