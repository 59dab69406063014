"""Evaluate a checkpoint on the held-out split, keep every example's result, and sign what came out.

The checkpoint is verified first, every byte. Config, data and code must be those of its statement. The
measures go into a signed test-result statement in CKPT/provenance/, with the sha256 of the file that holds
the results of the single examples (JSON lines; evaluations/ of the run folder, or --items). --at-least and
--at-most make it a test that can fail.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

import harness
from harness import environment
from harness.audit import attest
from harness.audit.opening import OpenedCheckpoint
from harness.commands import Outcome
from harness.commands.attest import verified
from harness.commands.trust import add_trust, trusted
from harness.errors import UsageError
from harness.format import files, layout
from harness.provenance import keys, later

EXAMPLE = "harness evaluate runs/tiny/checkpoints/step-00000060 --key alice.ed25519.pub alice.p256.pub"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The checkpoint, how much to look at, what must hold, who signs, whom to trust."""
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="checkpoint folder")
    parser.add_argument("--examples", type=int, default=256, metavar="N", help="held-out samples (256)")
    parser.add_argument("--folder", type=Path, default=Path("."), help="folder of the run's config (.)")
    for word in ("least", "most"):
        parser.add_argument(
            f"--at-{word}", action="append", default=[], metavar="METRIC=VALUE", help="fails otherwise"
        )
    parser.add_argument("--items", type=Path, metavar="FILE", help="where the single results go")
    parser.add_argument("--signing-key", type=Path, metavar="KEY", help="private key (default: yours)")
    add_trust(parser)


def run(arguments: argparse.Namespace) -> Outcome:
    """Verify, evaluate, keep, sign; exit code 1 when a measure is not what it must be."""
    folder: Path = arguments.checkpoint
    if layout.kind_of(folder) != "checkpoint":
        raise UsageError("is a run folder", where=str(folder), remedy="name one of its checkpoints")
    if arguments.examples < 1:
        raise UsageError("--examples must be positive")
    bounds = [
        (word, *_bound(text)) for word in ("least", "most") for text in getattr(arguments, f"at_{word}")
    ]
    environment.require_training()
    from harness.training.assess import assess

    path, reason = keys.signing_key_path(arguments.signing_key, folder)
    signer = keys.load_signer(path)
    opened = verified(folder, trusted(arguments), quiet=arguments.json)
    found = assess(opened, arguments.folder, arguments.examples, quiet=arguments.json)
    passed, failed = _judged(bounds, found.metrics)
    items, digest = _kept(arguments.items or _place(folder), found.items)
    predicate = _predicate(
        opened, found.metrics, len(found.items), {**found.settings, "items_sha256": digest}
    )
    predicate |= {"result": "FAILED" if failed else "PASSED", "passedTests": passed, "failedTests": failed}
    added = attest.add(opened, later.TEST_RESULT, predicate, signer)
    document: dict[str, Any] = {
        "checkpoint": opened.checkpoint_id,
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
        f"{predicate['result']}  {shown}  ({len(found.items)} held-out samples)",
        *(f"  failed     {text}" for text in failed),
        f"  items      {items}",
        f"  statement  {added.path}, signed by ed25519 {signer.ed25519_id[:16]}… ({reason})",
        f"  log        {added.reason}",
    ]
    return Outcome(document, "\n".join(lines), exit_code=1 if failed else 0)


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


def _kept(path: Path, items: Sequence[Mapping[str, float]]) -> tuple[Path, str]:
    """Write a line an example; returns where, and the sha256 of the file."""
    if path.exists():
        raise UsageError("is there already", where=str(path), remedy="name another file with --items")
    lines = [orjson.dumps({"example": number, **item}) + b"\n" for number, item in enumerate(items)]
    data = b"".join(lines)
    files.write_durable(path, data)
    return path, hashlib.sha256(data).hexdigest()


def _predicate(
    opened: OpenedCheckpoint, metrics: Mapping[str, float], examples: int, settings: Mapping[str, Any]
) -> dict[str, Any]:
    data = opened.statement.predicate["data"]
    corpus = data["corpus_sha256"]
    suite = {"name": str(data["kind"]), "split": "held-out", "sha256": corpus}
    version = harness.__version__
    return {
        "configuration": [{"name": "held-out split", "digest": {"sha256": corpus}}] if corpus else [],
        "harness_evaluation": {
            "metrics": {name: repr(float(value)) for name, value in metrics.items()},
            "examples": examples,
            "dataset": suite,
            "procedure": {"name": "held-out measures", "version": version, "settings": dict(settings)},
            # Nothing is generated: the measures are of given samples.
            "decoding": {},
            "environment": {
                name: value
                for name, value in environment.facts().items()
                if isinstance(value, str | int) or value is None
            },
            "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        },
    }
