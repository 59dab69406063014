"""Two checkpoints, or every step that two runs have in common: tensors by their bytes, statements by facts.

Tensors decide. The facts (`harness.audit.diff.facts`) say what may have caused a difference and what did not.
Without a policy no signature is checked: two folders can be equal and both forged, which the result says.
With one, both sides are verified first, payload bytes included (`verified`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness.audit.diff import facts, tensors
from harness.audit.diff.facts import Fact
from harness.audit.diff.tensors import Compared, Difference, Folder
from harness.audit.folders import story
from harness.audit.folders.story import Story
from harness.audit.verification import verify
from harness.errors import EnvironmentFault, EvidenceIncomplete, HarnessError, UsageError
from harness.format import files, layout
from harness.format.layout import RunFolder
from harness.format.ledger import Ledger
from harness.provenance.findings import raise_first
from harness.provenance.policy.rules import Policy

ELEMENTS = 1 << 18
"""Elements of a differing tensor that are measured unless more are asked for; about 0.1 s in pure Python."""


@dataclass(frozen=True)
class Pair:
    """Two folders to compare."""

    name: str
    """``step 10``, or the two folder names when they are not of one step."""
    step: int | None
    """Step of both; None when they are not of one step."""
    a: Folder
    b: Folder


@dataclass(frozen=True)
class Step:
    """The verdict on a pair."""

    name: str
    step: int | None
    compared: Compared
    facts: tuple[Fact, ...] | None
    """None when a statement cannot be read; `Result.notes` says why."""

    @property
    def equal(self) -> bool:
        """Whether every tensor is."""
        return not self.compared.differences


@dataclass(frozen=True)
class Plan:
    """What there is to compare."""

    a: Path
    b: Path
    pairs: tuple[Pair, ...]
    only_in_a: tuple[str, ...]
    """Names under checkpoints/ without a counterpart of the same step."""
    only_in_b: tuple[str, ...]

    @property
    def size(self) -> int:
        """Bytes of all tensors on both sides."""
        return sum(pair.a.size + pair.b.size for pair in self.pairs)


@dataclass(frozen=True)
class Result:
    """The verdict."""

    plan: Plan
    steps: tuple[Step, ...]
    notes: tuple[str, ...]
    trust: str | None = None
    """Whose signatures were verified; None when none were."""

    @property
    def equal(self) -> bool:
        """Whether every tensor of every pair is."""
        return all(step.equal for step in self.steps)

    @property
    def first(self) -> tuple[Step, Difference] | None:
        """The first differing tensor of the first differing step."""
        return next(((step, step.compared.differences[0]) for step in self.steps if not step.equal), None)

    def document(self) -> dict[str, Any]:
        """Everything as plain JSON."""
        first = self.first
        return {
            "a": str(self.plan.a),
            "b": str(self.plan.b),
            "equal": self.equal,
            "verified": self.trust is not None,
            "first": None
            if first is None
            else {"step": first[0].step, "part": first[1].part, "tensor": first[1].name},
            "steps": [_step_document(step) for step in self.steps],
            "only_in_a": list(self.plan.only_in_a),
            "only_in_b": list(self.plan.only_in_b),
            "notes": list(self.notes),
        }


def plan(a: Path, b: Path) -> Plan:
    """Pair up checkpoints and read the headers of their tensors.

    Raises `UsageError` when A and B are of different kinds or one folder, `EvidenceIncomplete` when no step
    is common or a payload is missing, `VerificationFailed` for a broken header.
    """
    kinds = layout.kind_of(a), layout.kind_of(b)
    if kinds[0] != kinds[1]:
        what = f"A is a {kinds[0]} and B a {kinds[1]}"
        raise UsageError(what, where=f"{a}, {b}", remedy="give two runs or two checkpoints")
    if a.samefile(b):
        raise UsageError("A and B are the same folder", where=str(a), remedy="name two")
    if kinds[0] == "checkpoint":
        return Plan(a, b, (_pair(a, b),), (), ())
    left, right = _by_step(a), _by_step(b)
    common = sorted({*left} & {*right})
    if not common:
        what = f"no step is complete in both runs: A has {_steps(left)}, B has {_steps(right)}"
        raise EvidenceIncomplete(what, remedy="train both to a common step, or compare two checkpoints")
    pairs = tuple(_pair(left[step], right[step]) for step in common)
    return Plan(a, b, pairs, _others(a, common), _others(b, common))


@dataclass(frozen=True)
class Verified:
    """What a verification of both sides found."""

    signers: str
    stories: Mapping[Path, Story]
    """Resolved folder of a checkpoint → what it says."""


def verified(planned: Plan, policy: Policy, *, quiet: bool) -> Verified:
    """Verify both sides as `harness verify` does.

    Raises `VerificationFailed` or `EvidenceIncomplete` with the first reason when a side is not good.
    """
    signers: dict[str, None] = {}
    stories: dict[Path, Story] = {}
    for side in (planned.a, planned.b):
        report = verify.verify(side, policy, quiet=quiet)
        raise_first(report.findings)
        signers |= dict.fromkeys(name for each in report.checkpoints for name in each.signers)
        stories |= {files.real(each.folder): story.of(each) for each in report.checkpoints}
    return Verified(", ".join(signers), stories)


def compare(
    planned: Plan, limit: int, advance: Callable[[int], None], found: Verified | None = None
) -> Result:
    """Compare all pairs; at most ``limit`` elements of a differing tensor are measured.

    ``found``: by `verified`, if it was called. ``advance`` is told the bytes that are done.

    Raises `VerificationFailed` for a file that ends early or has changed since ``planned`` was made.
    """
    steps, notes = [], []
    for pair in planned.pairs:
        compared = tensors.compare(pair.a, pair.b, limit, advance)
        differing, remarks = _facts(pair, found)
        notes += remarks
        steps.append(Step(pair.name, pair.step, compared, differing))
    return Result(planned, tuple(steps), tuple(notes), None if found is None else found.signers)


def _pair(a: Path, b: Path) -> Pair:
    names = [files.real(path).name for path in (a, b)]
    steps = [layout.parse_checkpoint_name(name) for name in names]
    if steps[0] is not None and steps[0] == steps[1]:
        return Pair(f"step {steps[0]}", steps[0], tensors.read(a), tensors.read(b))
    return Pair(f"{names[0]} | {names[1]}", None, tensors.read(a), tensors.read(b))


def _by_step(root: Path) -> dict[int, Path]:
    found = {layout.parse_checkpoint_name(path.name): path for path in RunFolder(root).complete()}
    return {step: path for step, path in found.items() if step is not None}


def _others(root: Path, common: Sequence[int]) -> tuple[str, ...]:
    run = RunFolder(root)
    names = [path.name for path in (*run.complete(), *run.pruned(), *run.aside())]
    return tuple(name for name in names if layout.parse_checkpoint_name(name) not in common)


def _steps(found: dict[int, Path]) -> str:
    steps = sorted(found)
    return ", ".join(map(str, steps[:5])) + (", …" if len(steps) > 5 else "") if steps else "none"


def _story(folder: Path, found: Verified | None) -> Story:
    return story.unverified(folder) if found is None else found.stories[files.real(folder)]


def _facts(pair: Pair, found: Verified | None) -> tuple[tuple[Fact, ...] | None, list[str]]:
    """The facts that differ, and remarks on what could not be compared."""
    notes: list[str] = []
    try:
        stories = _story(pair.a.path, found), _story(pair.b.path, found)
    except EnvironmentFault:
        raise
    except HarnessError as error:
        return None, [f"{pair.name}: the statements are not compared: {error}"]
    try:
        ledgers: tuple[Ledger | None, Ledger | None] = story.ledger(stories[0]), story.ledger(stories[1])
    except EnvironmentFault:
        raise
    except HarnessError as error:
        ledgers = None, None
        notes.append(f"{pair.name}: the kernels are not compared: {error}")
    predicates = [each.statement.predicate for each in stories]
    return tuple(facts.differences(predicates[0], predicates[1], ledgers)), notes


def _step_document(step: Step) -> dict[str, Any]:
    compared = step.compared
    return {
        "name": step.name,
        "step": step.step,
        "equal": step.equal,
        "tensors": dict(compared.counts),
        "bytes_compared": compared.bytes_compared,
        "differences": [asdict(each) for each in compared.differences],
        "facts": None if step.facts is None else [asdict(fact) for fact in step.facts],
    }
