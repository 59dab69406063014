"""The facts of a checkpoint statement: what is fixed for a launch, and what is new at each save."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.checkpoint.candidates import Skipped
from harness.checkpoint.publisher import Commit
from harness.format import moments
from harness.format.manifest import Manifest, state_digest
from harness.provenance.transparency import log
from harness.training.step.readback import Values
from harness.words import listed

_SHOWN = 8
"""Differences that an error lists before it counts the rest."""


@dataclass(frozen=True)
class Difference:
    """Something that is not as it was in the segment before."""

    what: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.what}: {self.before} → {self.after}"


def in_words(differences: Sequence[Difference]) -> str:
    """The first of ``differences`` and how many more there are, for an error."""
    return listed([str(each) for each in differences], _SHOWN, "; ")


@dataclass(frozen=True)
class Segment:
    """One launch in the life of a run, and how it continues the one before."""

    number: int
    kind: str
    """``genesis``, ``exact``, ``same-data`` or ``accepted``."""
    differences: tuple[Difference, ...] = ()
    accepted: tuple[str, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    resumed_from: tuple[str, int] | None = None
    """Checkpoint id and step."""

    def document(self) -> dict[str, Any]:
        """The predicate's ``segment``."""
        source = self.resumed_from
        return {
            "number": self.number,
            "reason": "first launch" if source is None else "resume",
            "class": self.kind,
            "differences": [
                {"what": item.what, "before": item.before, "after": item.after} for item in self.differences
            ],
            "accepted": list(self.accepted),
            "skipped": [
                {"name": item.name, "reason": item.reason, "checkpoint": item.checkpoint}
                for item in self.skipped
            ],
            "resumed_from": None if source is None else {"checkpoint": source[0], "step": source[1]},
        }


@dataclass(frozen=True)
class RunFacts:
    """What is the same in every statement of a launch."""

    run: Mapping[str, Any]
    segment: Segment
    launch: Mapping[str, Any]
    config: Mapping[str, Any]
    code: Mapping[str, Any]
    data: Mapping[str, Any]
    environment: Mapping[str, Any]
    determinism_mode: str
    determinism_settings: Mapping[str, Any]
    start: Mapping[str, Any] | None = None
    """The checkpoint of another run that this one began with."""
    policy: Mapping[str, Any] | None = None
    """The policy that the run is made under, by name and digest."""


@dataclass(frozen=True)
class StepFacts:
    """What is new at a save."""

    step: int
    cursor: Mapping[str, int]
    ledger: Mapping[str, Any] | None
    chain: str | None
    latest: Values | None
    """The numbers and digests of the newest step; None when this launch has taken none."""
    evaluation: Mapping[str, float] = field(default_factory=dict)
    outcome: str = "ok"
    lines: str | None = None
    """Hex sha256 of the lines of metrics.jsonl that this launch has written; None where there is no chain."""


def predicate(
    facts: RunFacts, now: StepFacts, manifest: Manifest, parent: Commit | None, head: log.Head | None
) -> dict[str, Any]:
    """The predicate ``checkpoint/v1``; no floats: a number with a fraction is a decimal string."""
    return {
        "run": dict(facts.run),
        "sequence": 0 if parent is None else parent.sequence + 1,
        "steps": {"from": 0 if parent is None else parent.step, "to": now.step},
        "parent": "genesis" if parent is None else {"checkpoint": parent.checkpoint, "step": parent.step},
        "start": None if facts.start is None else dict(facts.start),
        "policy": None if facts.policy is None else dict(facts.policy),
        "segment": facts.segment.document(),
        "launch": dict(facts.launch),
        "config": dict(facts.config),
        "code": dict(facts.code),
        "data": dict(facts.data),
        "cursor": dict(now.cursor),
        "environment": dict(facts.environment),
        "determinism": {
            "mode": facts.determinism_mode,
            "settings": dict(facts.determinism_settings),
            "ledger": None if now.ledger is None else dict(now.ledger),
        },
        "state": _state(manifest),
        "metrics": {
            "chain": now.chain,
            "lines": now.lines,
            **_numbers(now.latest),
            "evaluation": {name: repr(value) for name, value in now.evaluation.items()},
        },
        "log": None if head is None else {"size": head.size, "root": head.root.hex()},
        "created": moments.now(),
        "outcome": now.outcome,
    }


def _state(manifest: Manifest) -> dict[str, Any]:
    parameters = sum(
        math.prod(tensor.shape) for tensor in manifest.tensors if tensor.file.startswith("model")
    )
    return {
        "sha256": state_digest(manifest.tensors),
        "tensors": len(manifest.tensors),
        "parameters": parameters,
    }


def _numbers(latest: Values | None) -> dict[str, str | None]:
    if latest is None:
        return dict.fromkeys(("loss", "grad_norm", "gradients", "state"))
    return {
        "loss": _decimal(latest.loss),
        "grad_norm": _decimal(latest.norm),
        "gradients": None if latest.gradients is None else latest.gradients.hex(),
        "state": None if latest.state is None else latest.state.hex(),
    }


def _decimal(value: float | None) -> str | None:
    return None if value is None else repr(value)


def plain(facts: Mapping[str, Any]) -> dict[str, Any]:
    """``facts`` with every float as its shortest decimal string, nested mappings and lists included."""
    return {name: _plain(value) for name, value in facts.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, Mapping):
        return plain(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value
