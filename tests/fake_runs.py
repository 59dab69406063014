"""Run folders as a trainer leaves them, written by hand: for tests of what reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from harness.provenance import statements
from harness.provenance.signing import envelope, keys

NOBODY = keys.Signer(Ed25519PrivateKey.from_private_bytes(bytes(32)), None)
"""Whom no test trusts."""
START = 1_795_000_000.0
"""Unix time of the first step; each takes half a second."""


def lines(steps: int, *, every: int = 10) -> list[dict[str, Any]]:
    """Metrics of ``steps`` steps, the loss falling from 5 towards 2, evaluated each ``every``."""
    made = []
    for step in range(1, steps + 1):
        line: dict[str, Any] = {
            "step": step,
            "loss": 2 + 3 * 0.97**step,
            "lr": 1e-3,
            "samples": step * 8,
            "tokens": step * 1024,
            "tokens_per_s": 2048.0,
            "time": START + step / 2,
        }
        if step % every == 0:
            line["evaluation"] = {"loss": line["loss"] + 0.05, "bits_per_byte": line["loss"] * 1.4427}
        made.append(line)
    return made


def predicate(name: str, step: int, *, segment: int = 0, resumed_from: int | None = None) -> dict[str, Any]:
    """What a checkpoint's statement says; each is the first of its run, so that no parent is needed."""
    return {
        "run": {"id": "a" * 32, "name": name, "seed": 0},
        "sequence": 0,
        "parent": "genesis",
        "start": None,
        "steps": {"from": 0, "to": step},
        "segment": {
            "number": segment,
            "reason": "first launch" if resumed_from is None else "resume",
            "class": "genesis" if resumed_from is None else "exact",
            "differences": [],
            "accepted": [],
            "skipped": [],
            "resumed_from": None if resumed_from is None else {"checkpoint": "b" * 64, "step": resumed_from},
        },
        "launch": {
            "command": ["harness", "train"],
            "launcher": "torchrun",
            "world_size": 2,
            "nodes": 1,
            "mesh": {"data_parallel": 2},
            "precision": "fp32",
            "compile": False,
            "parallel": "ddp",
            "backend": "gloo",
        },
        "config": {"sha256": "c" * 64, "text": ""},
        "code": {
            "harness": "0.1.0",
            "git_commit": "d" * 40,
            "dirty": False,
            "diff_sha256": None,
            "task": None,
        },
        "data": {"kind": "wheel", "corpus_sha256": "e" * 64, "tokenizer_sha256": None, "counts": {}},
        "cursor": {"step": step, "samples": 0, "tokens": 0, "epoch": 0, "position": 0},
        "environment": {"python": "3.11.7", "packages": {"torch": "2.13.0"}},
        "determinism": {"mode": "warn", "settings": {}, "ledger": None},
        "state": {"sha256": "f" * 64, "tensors": 3, "parameters": 100},
        "metrics": {
            "chain": None,
            "loss": None,
            "grad_norm": None,
            "gradients": None,
            "state": None,
            "evaluation": {},
        },
        "log": None,
        "created": "2026-11-23T20:00:00Z",
        "outcome": "ok",
    }


def write_checkpoint(run: Path, folder: str, facts: Mapping[str, Any]) -> Path:
    """A checkpoint folder that holds a bundle around ``facts`` and nothing else."""
    path = run / "checkpoints" / folder
    (path / "provenance").mkdir(parents=True)
    statement = statements.checkpoint_statement(
        subject_id="0" * 64, dir_hash="h1:", name=folder, predicate=facts
    )
    bundle = envelope.sign(statement, NOBODY.ed25519, keys.public_keys(NOBODY)[0])
    (path / "provenance" / "checkpoint.sigstore.json").write_bytes(bundle)
    return path


def write_metrics(run: Path, made: list[dict[str, Any]], tail: str = "") -> None:
    """metrics.jsonl of ``made``, with ``tail`` after the last whole line."""
    text = "".join(json.dumps(line) + "\n" for line in made)
    (run / "metrics.jsonl").write_text(text + tail)


def write_events(run: Path, made: list[dict[str, Any]], rank: int = 0) -> None:
    """The events file of ``rank``."""
    folder = run / "events"
    folder.mkdir(exist_ok=True)
    (folder / f"rank-{rank:05d}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in made))


def finished(
    root: Path,
    *,
    steps: int = 60,
    seed: int = 0,
    settings: str = "",
    figures: Mapping[str, float | None] | None = None,
) -> Path:
    """A finished run that was resumed once, after step 20; ``settings``: more lines of its run.yaml,
    ``figures``: of its last evaluation."""
    root.mkdir(parents=True)
    config = f"run:\n  dir: {root}\n  seed: {seed}\ntrain:\n  steps: {steps}\n{settings}"
    (root / "run.yaml").write_text(config)
    made = lines(steps)
    made[-1].setdefault("evaluation", {}).update(figures or {})
    write_metrics(root, made)
    for step in range(20, steps + 1, 20):
        resumed = None if step == 20 else 20
        facts = predicate(root.name, step, segment=int(resumed is not None), resumed_from=resumed)
        facts["run"]["seed"] = seed
        write_checkpoint(root, f"step-{step:08d}", facts)
    return root
