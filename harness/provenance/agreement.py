"""Agreement: everything that a checkpoint folder says more than once, it says alike.

- the folder's name against the statement
- within the statement, and against the manifest: name, step, cursor, digests of config, state and ledger
- trainer.json and ledger.json against the statement
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from harness.format import layout, strict_json
from harness.format import ledger as ledgers
from harness.format.manifest import Manifest, state_digest
from harness.provenance.evidence import Evidence
from harness.provenance.findings import Reason
from harness.provenance.statements import CheckpointStatement


def disagreements(
    evidence: Evidence, statement: CheckpointStatement, manifest: Manifest | None
) -> Iterator[Reason]:
    """Every place where folder, manifest and statement say different things; of what was verified before,
    only the folder can."""
    yield from _misplaced(evidence, statement)
    if manifest is not None and not evidence.is_known:
        yield from _contradictions(evidence, statement, manifest)


def trainer_disagreements(
    data: bytes, statement: CheckpointStatement, where: str
) -> Iterator[tuple[str, str]]:
    """What trainer.json says otherwise than the statement. Raises `VerificationFailed` for broken JSON."""
    document = strict_json.loads(data, where=where)
    if not isinstance(document, dict):
        yield "is no JSON object", where
        return
    facts = statement.predicate
    expected = {
        "step": statement.step_to,
        "world_size": facts["launch"]["world_size"],
        "segment": facts["segment"]["number"],
        "cursor": facts["cursor"],
    }
    if facts["metrics"]["chain"] is not None:
        expected["chain"] = facts["metrics"]["chain"]
    for key, value in expected.items():
        if strict_json.dumps(document.get(key)) != strict_json.dumps(value):
            yield f"has {key} {_short(document.get(key))}, the statement {_short(value)}", where


def ledger_disagreements(
    data: bytes, statement: CheckpointStatement, where: str
) -> Iterator[tuple[str, str]]:
    """What ledger.json holds otherwise than the statement counts.

    Earlier statements count fewer kinds of rows; what they do count must be right. Raises
    `VerificationFailed` for what is no ledger.
    """
    facts, ledger = statement.predicate["determinism"], ledgers.Ledger.parse(data, where)
    stated = facts["ledger"] or {}
    for key, found in ledgers.counts(ledger).items():
        place = first_difference(stated[key], found, key) if key in stated else None
        if place is not None:
            yield f"holds other {place} than the statement says", where
    if ledger.mode != facts["mode"]:
        yield f"was kept in mode {ledger.mode}, the statement says {facts['mode']}", where


def first_difference(expected: Any, found: Any, path: str) -> str | None:
    """The first place, like ``segment.number``, where two JSON values differ; None where they are equal,
    as 1 and true are."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in sorted({*expected, *found}):
            place = first_difference(expected.get(key), found.get(key), f"{path}.{key}")
            if place is not None:
                return place
        return None if set(expected) == set(found) else path.lstrip(".")
    return None if expected == found else path.lstrip(".")


def _misplaced(evidence: Evidence, statement: CheckpointStatement) -> Iterator[Reason]:
    """What the folder's name says otherwise than the statement."""
    kind, name = layout.kind_of_name(evidence.name)
    outcome = statement.predicate["outcome"]
    if name is not None and name != statement.name:
        yield f"the folder was signed as {statement.name}", evidence.where, "give it that name again"
    if outcome != "ok" and kind != "nonfinite":
        what = "the state of a run that became non-finite is shown as a good checkpoint"
        yield what, evidence.where, "use an older checkpoint"
    if outcome == "ok" and kind == "nonfinite":
        yield "a good checkpoint is shown as non-finite", evidence.where


def _contradictions(
    evidence: Evidence, statement: CheckpointStatement, manifest: Manifest
) -> Iterator[Reason]:
    """What the statement says twice, or otherwise than the manifest."""
    facts, where = statement.predicate, evidence.at(layout.CHECKPOINT_BUNDLE)
    step = statement.step_to
    if statement.name != layout.checkpoint_name(step):
        yield f"is named {statement.name}, its step is {step}", where
    if facts["cursor"]["step"] != step:
        yield f"has the data cursor at step {facts['cursor']['step']}, not {step}", where
    if hashlib.sha256(facts["config"]["text"].encode()).hexdigest() != facts["config"]["sha256"]:
        yield "has a config text with another digest than its own", where
    state = facts["state"]
    if state["sha256"] != state_digest(manifest.tensors) or state["tensors"] != len(manifest.tensors):
        yield "has a state digest that is not that of the manifest's tensors", where
    ledger = facts["determinism"]["ledger"]
    if ledger is not None and ledger["sha256"] != manifest.digests.get(layout.LEDGER):
        yield "names another ledger.json than the manifest", where
    if layout.TRAINER not in manifest.digests:
        yield "lists no trainer.json", evidence.at(layout.MANIFEST)
    for tensor in manifest.tensors:
        if not tensor.file.endswith(".safetensors"):
            yield f"lists the tensor `{tensor.name}` in {tensor.file}", evidence.at(layout.MANIFEST)


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 else text[:60]
