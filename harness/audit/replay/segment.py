"""Which part of a run a replay executes again, and what was signed about it.

Nothing is chosen that is not authentic: every checkpoint is examined (signatures, statements, manifest, file
set), the lineage between them is checked, and metrics.jsonl is recomputed against the heads that they have
signed. What a replay is then compared with is what was signed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from harness.audit.folders import opening, story
from harness.audit.folders.opening import OpenedCheckpoint
from harness.audit.run import handover, own_files, seen
from harness.errors import EvidenceIncomplete, UsageError
from harness.format import chain, strict_json
from harness.format.layout import RunFolder
from harness.provenance import history
from harness.provenance.findings import Findings
from harness.provenance.history import Entry
from harness.provenance.policy.rules import Policy

_SAME_LAUNCH = ("world_size", "precision", "compile", "parallel", "backend")


@dataclass(frozen=True)
class Step:
    """What the run has recorded of one step."""

    number: int
    facts: Mapping[str, Any]
    """The line of metrics.jsonl."""

    @property
    def head(self) -> str:
        """The chain after it, hex."""
        return str(self.facts["chain"])


@dataclass(frozen=True)
class Segment:
    """Steps to execute again, from a checkpoint on or from the beginning of the run."""

    run: RunFolder
    start: OpenedCheckpoint | None
    """None: the run's own beginning."""
    end: OpenedCheckpoint
    """The first signed checkpoint at or after the last step; what the verdict is about."""
    steps: tuple[Step, ...]
    """As recorded, from the first one after ``start`` on."""

    @property
    def first(self) -> int:
        """Updates that ``start`` has."""
        return 0 if self.start is None else self.start.statement.step_to

    @property
    def last(self) -> int:
        """The last step that is executed again."""
        return self.steps[-1].number

    @property
    def head(self) -> bytes:
        """The chain that the first step continues."""
        if self.start is None:
            return chain.GENESIS
        return bytes.fromhex(self.start.statement.predicate["metrics"]["chain"])

    @property
    def facts(self) -> Mapping[str, Any]:
        """What was signed about the launch: the predicate of ``end``."""
        return self.end.statement.predicate


@dataclass(frozen=True)
class Authentic:
    """The checkpoints and lines of a run that were found in order."""

    run: RunFolder
    checkpoints: tuple[OpenedCheckpoint, ...]
    """By step; pruned ones, too."""
    steps: Mapping[int, Step]

    def segment(self, first: int, last: int) -> Segment:
        """The segment that holds the updates after step ``first`` up to step ``last``.

        Raises `UsageError` for steps that the run does not have, `EvidenceIncomplete` for what was not signed
        or cannot be executed in one go.
        """
        if not 0 <= first < last:
            raise UsageError(
                f"--from {first} --to {last} holds no step", remedy="--from is at least 0, and before --to"
            )
        end = next((each for each in self.checkpoints if each.statement.step_to >= last), None)
        if end is None:
            signed = self.checkpoints[-1].statement.step_to
            raise EvidenceIncomplete(
                f"step {last} is not signed yet, the newest checkpoint is of step {signed}",
                where=str(self.run.root),
                remedy=f"use --to {signed}, or wait for a checkpoint",
            )
        usable = [each for each in self.checkpoints if each.kind == "complete"]
        start = max(
            (each for each in usable if each.statement.step_to <= first),
            key=lambda each: each.statement.step_to,
            default=None,
        )
        begin = 0 if start is None else start.statement.step_to
        if start is None and end.statement.start is not None:
            raise EvidenceIncomplete(
                "the run began with a checkpoint of another run, and its first steps are not replayed",
                where=str(self.run.root),
                remedy="choose --from at or after its first checkpoint",
            )
        absent = [number for number in range(begin + 1, last + 1) if number not in self.steps]
        if absent:
            raise EvidenceIncomplete(f"has no line of step {absent[0]}", where=str(self.run.metrics))
        within = [
            each for each in self.checkpoints if begin < each.statement.step_to <= end.statement.step_to
        ]
        _refuse_change(within)
        steps = tuple(self.steps[number] for number in range(begin + 1, last + 1))
        return Segment(self.run, start, end, steps)

    def around(self, step: int) -> Segment:
        """The segment between the neighbouring checkpoints that hold ``step``; errors as of `segment`."""
        ends = [0, *(each.statement.step_to for each in self.checkpoints)]
        first = max(each for each in ends if each < step)
        last = min((each for each in ends if each >= step), default=step)
        return self.segment(first, last)

    def sampled(self, count: int, seed: int) -> list[Segment]:
        """``count`` segments between neighbouring checkpoints, drawn by ``seed``, and each in which the
        ledger has new entries; in order."""
        bounds = [
            (one.statement.step_to, other.statement.step_to)
            for one, other in pairwise(self.checkpoints)
            if one.kind == "complete"
        ]
        if self.checkpoints and self.checkpoints[0].statement.start is None:
            bounds.insert(0, (0, self.checkpoints[0].statement.step_to))
        drawn = set(random.Random(seed).sample(bounds, min(count, len(bounds))))
        news = set(self._with_new_entries())
        chosen = [bound for bound in bounds if bound in drawn or bound[1] in news]
        return [self.segment(first, last) for first, last in chosen]

    def _with_new_entries(self) -> Iterator[int]:
        """The steps of checkpoints whose ledger names an operator that the one before does not."""
        known: set[str] | None = None
        for each in self.checkpoints:
            ledger = story.ledger(story.of(each))
            if ledger is None:
                continue
            names = {f"{row.op} {row.call_site} {row.evidence}" for row in ledger.rows}
            if known is not None and names - known:
                yield each.statement.step_to
            known = names if known is None else known | names


def authentic(run: RunFolder, policy: Policy) -> Authentic:
    """Examine the whole run but for payload bytes. Raises the first failure."""
    findings = Findings()
    shown, folders = seen.beside(run.root, policy), (*run.complete(), *run.pruned())
    policy = handover.trust(run.root, policy, shown).policy
    opened = [opening.examine_folder(each, policy, findings, shown.bundles) for each in folders]
    known = sorted((each for each in opened if each is not None), key=lambda each: each.statement.step_to)
    entries = [
        Entry(str(each.folder), each.statement, each.checkpoint_id, each.bundle_sha256) for each in known
    ]
    history.check_lineage(entries, findings)
    if not known:
        findings.raise_first()
        raise EvidenceIncomplete("the run has no signed checkpoint", where=str(run.root))
    if known[-1].statement.predicate["metrics"]["chain"] is None:
        raise EvidenceIncomplete(
            "the run kept no step digests, so there is nothing to compare a replay with",
            where=str(run.root),
            remedy="train with determinism.step_digests=true",
        )
    read: list[bytes] = []
    own_files.check_metrics(run, entries, findings, read.append)
    findings.raise_first()
    lines = (strict_json.loads(line, where=str(run.metrics)) for line in read if line.endswith(b"\n"))
    signed = known[-1].statement.step_to
    steps = {line["step"]: Step(line["step"], line) for line in lines if line["step"] <= signed}
    return Authentic(run, tuple(known), steps)


def digested_as(checkpoint: OpenedCheckpoint) -> object:
    """The definition by which the run's step digests were made, as signed; None when nothing says it."""
    return checkpoint.statement.predicate["determinism"]["settings"].get(chain.DEFINITION)


def _refuse_change(within: Sequence[OpenedCheckpoint]) -> None:
    """All checkpoints of a segment must have been made by the same kind of launch."""
    for one, other in pairwise(within):
        before, after = one.statement.predicate, other.statement.predicate
        changed = [name for name in ("config", "code", "data") if before[name] != after[name]]
        changed += [name for name in _SAME_LAUNCH if before["launch"][name] != after["launch"][name]]
        if digested_as(one) != digested_as(other):
            changed.append("definition of the step digests")
        stacks = [each["environment"].get("stack") for each in (before, after)]
        if changed or stacks[0] != stacks[1]:
            step = one.statement.step_to
            raise EvidenceIncomplete(
                f"the launch changed after step {step}: {', '.join(changed or ['stack'])}",
                where=other.folder.name,
                remedy=f"replay up to {step} and from {step} on apart",
            )
