"""Which tier of repeatability the evidence on a run supports: pure rules, from what was signed to a verdict.

A tier is a verdict on evidence, not a promise. For every tier:

- only what is signed under the reader's policy counts; without a policy, nothing was observed
- without evidence the answer is ``none: not observed``, never "deterministic"
- loss and gradient norm are no evidence: a replay counts that compared digests of gradients or of state
- a replay that is ``outside`` contradicts the record, and no tier holds beside it; one that is
  ``inconclusive`` says nothing

Tier 1a, the same bits again on the same stack with as many processes:

- a replay on the signed stack, with the signed number of processes, was equal over a whole segment between
  two checkpoints
- no operator was measured to differ between two executions
- an operator that is documented, observed or unknown is in the way, unless enough clean double executions
  have refuted it, or it was at work in steps that a replay found equal
- the bound is told: segments that were replayed of all, so that an altered one would have been found with
  that chance

Tier 1b, the same bits with another number of processes:

- a replay was equal over a whole segment while nothing differed but the number of processes, and no operator
  is in the way as of tier 1a; the numbers that were seen are named, others are not covered
- tier 1a is not taken for granted by it, nor needed: who audits a run of eight processes may have one

Tier 2, a rerun that differs no more than honest reruns do:

- a replay lies within three times a noise floor in every tensor, the floor measured from at least five
  perturbations that gave bits of their own, with the least change that it would have found; numbers decide,
  not the verdict's word
- precisions whose floor is wide are called weak

Tier 3, a claim that holds for other seeds and stacks:

- a claim of a report that is supported by at least five seeds on each side, over at least two stacks, from
  runs that verify
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from harness.audit.replay import noise_floor
from harness.format.ledger import Ledger, Row
from harness.words import counted, listed

Name = Literal["1a", "1b", "2", "3"]

TITLES: Mapping[Name, str] = {
    "1a": "the same bits again, on the same stack with as many processes",
    "1b": "the same bits with another number of processes",
    "2": "a rerun differs no more than honest reruns do",
    "3": "a claim holds for other seeds and stacks",
}
NOT_SIGNED = "no signature was checked: give --key or --policy"
LEAST_SEEDS, LEAST_STACKS = 5, 2
LEAST_CLEAN = 30
"""Clean double executions from which an operator counts as refuted: it differs in at most one of ten."""
_DIGESTS = ("gradients", "state")
_WORLD = frozenset({"launch.world_size", "launch.backend"})
"""What another number of processes changes in a statement: one process needs no backend. An elastic run,
which promises the same bits, counts neither as a difference."""
_SHOWN = 3


@dataclass(frozen=True)
class Replay:
    """A verified statement of kind replay."""

    name: str
    """``step-00000040/replay-0``."""
    signer: str
    """Who signed it, in the words of the policy."""
    own: bool
    """Whether that is the key that signed the checkpoint."""
    world_size: int
    """Processes of the checkpoint's launch."""
    predicate: Mapping[str, Any]

    @property
    def steps(self) -> tuple[int, int]:
        """Updates before it, and after it."""
        return int(self.predicate["steps"]["from"]), int(self.predicate["steps"]["to"])

    @property
    def verdict(self) -> str:
        """``equal``, ``within floor``, ``outside`` or ``inconclusive``."""
        return str(self.predicate["verdict"])

    @property
    def compared(self) -> dict[str, int]:
        """Kind of digest → steps in which it was compared."""
        found = {str(each["what"]): int(each["count"]) for each in self.predicate["compared"]}
        return {name: found[name] for name in _DIGESTS if found.get(name)}

    @property
    def processes(self) -> int:
        """Processes of the replay; the signed number when it tells none."""
        return int(self.predicate["replayer"]["environment"].get("world_size", self.world_size))

    @property
    def differing(self) -> tuple[str, ...]:
        """What of stack and launch was not as signed."""
        fingerprint = self.predicate["fingerprint"]
        told = tuple(str(each["what"]) for each in fingerprint["differences"])
        return told if told or fingerprint["same"] else ("something that it does not name",)

    @property
    def says(self) -> str:
        """It in one line."""
        first, last = self.steps
        counts = ", ".join(f"{name} of {counted(number, 'step')}" for name, number in self.compared.items())
        who = "the run's own key" if self.own else self.signer
        return f"{self.name}: steps {first} to {last} {self.verdict} ({counts}), signed by {who}"


@dataclass(frozen=True)
class Claim:
    """A claim of a report that its runs, all verified, support."""

    name: str
    seeds: int
    """The fewer of both arms."""
    stacks: int
    """Different stacks among its runs."""


@dataclass(frozen=True)
class Evidence:
    """Everything that a tier may rest on."""

    nothing: str | None = None
    """Why nothing counts; None when signatures were checked."""
    segments: tuple[tuple[int, int], ...] = ()
    """Steps between neighbouring checkpoints, those that belong to what is asked about."""
    precision: str = "fp32"
    ledger: Ledger | None = None
    """Of the newest checkpoint, whose statement names it; None when it is not there."""
    unread_rows: int = 0
    """Rows that the statement counts of a ledger that is not there."""
    replays: tuple[Replay, ...] = ()
    claims: tuple[Claim, ...] = ()


@dataclass(frozen=True)
class Tier:
    """One tier, whether it holds, and why."""

    name: Name
    evidence: tuple[str, ...]
    """What it rests on; empty when it does not hold."""
    missing: tuple[str, ...]
    """What it lacks; empty when it holds."""
    reaches: tuple[str, ...] = ()
    """How far the evidence goes."""

    @property
    def held(self) -> bool:
        """Whether the evidence supports it."""
        return not self.missing


@dataclass(frozen=True)
class Tiers:
    """The verdict on all of them, in order."""

    tiers: tuple[Tier, ...]
    contradicted: tuple[str, ...]
    """Replays that are outside."""
    observed: bool
    """Whether there was anything to judge."""
    nothing: str | None = None
    """Why nothing counts."""

    @property
    def told(self) -> tuple[Tier, ...]:
        """Those that hold, without the one that another includes."""
        held = tuple(each for each in self.tiers if each.held)
        wider = any(each.name == "1b" for each in held)
        return tuple(each for each in held if not (wider and each.name == "1a"))

    @property
    def headline(self) -> str:
        """``tier 1a``, ``tier 1b and tier 3``, ``none: not observed`` …"""
        if self.told:
            return " and ".join(f"tier {each.name}" for each in self.told)
        if self.contradicted:
            return f"none: contradicted by {self.contradicted[0].partition(':')[0]}"
        return (
            "none: not observed" if not self.observed else f"none: it would take {self.tiers[0].missing[0]}"
        )

    @property
    def next(self) -> Tier | None:
        """The first one that does not hold."""
        return next((each for each in self.tiers if not each.held), None)


def compute(evidence: Evidence) -> Tiers:
    """The verdict of the rules above."""
    replays = [each for each in evidence.replays if each.compared]
    outside = tuple(each.says for each in evidence.replays if each.verdict == "outside")
    if evidence.nothing is not None:
        nothing = (evidence.nothing,)
        tiers = tuple(Tier(name, (), nothing) for name in TITLES)
        return Tiers(tiers, (), observed=False, nothing=evidence.nothing)
    tiers = (
        _same_stack(evidence, replays),
        _other_world(evidence, replays),
        _floor(replays),
        _claims(evidence),
    )
    if outside:
        tiers = tuple(Tier(each.name, (), outside) for each in tiers)
    observed = any(each.verdict != "inconclusive" for each in replays) or bool(evidence.claims)
    return Tiers(tiers, outside, observed)


def _same_stack(evidence: Evidence, replays: Sequence[Replay]) -> Tier:
    equal = [
        each
        for each in replays
        if each.verdict == "equal" and not each.differing and each.processes == each.world_size
    ]
    whole = [each for each in equal if _covered(evidence, [each])]
    missing = [] if whole else [_no_replay(evidence, replays, equal)]
    missing += _in_the_way(evidence, equal)
    if missing:
        return Tier("1a", (), tuple(missing))
    done, all_of_them = len(_covered(evidence, whole)), len(evidence.segments)
    reach = f"{done} of {counted(all_of_them, 'segment')} between checkpoints executed again"
    if done < all_of_them:
        reach += f"; drawn at random, they find a single altered one with a chance of {done}/{all_of_them}"
    steps = {step for each in whole for step in range(each.steps[0] + 1, each.steps[1] + 1)}
    repeated = f"{counted(len(steps), 'step')} repeated without a difference"
    # The rule of three, which says nothing of three or fewer.
    vary = f": at most {3 / len(steps):.1%} of steps vary (95 %)" if len(steps) > 3 else ""
    return Tier("1a", tuple(each.says for each in whole), (), (reach, repeated + vary))


def _no_replay(evidence: Evidence, replays: Sequence[Replay], equal: Sequence[Replay]) -> str:
    if equal:
        return "a replay of a whole segment between two checkpoints (the equal ones cover none)"
    if any(each.verdict == "equal" for each in replays):
        return "an equal replay on the signed stack and number of processes (these differ)"
    if evidence.replays and not replays:
        return "a replay that compared digests of gradients or state"
    return "a replay with the signed stack that is equal (harness replay)"


def _covered(evidence: Evidence, replays: Sequence[Replay]) -> set[tuple[int, int]]:
    """The whole segments that the steps of ``replays`` hold."""
    return {
        (first, last)
        for first, last in evidence.segments
        for each in replays
        if each.steps[0] <= first < last <= each.steps[1]
    }


def _in_the_way(evidence: Evidence, equal: Sequence[Replay]) -> Iterator[str]:
    ledger = evidence.ledger
    if ledger is None:
        if evidence.unread_rows:
            yield f"the ledger, which is not here: its statement counts {evidence.unread_rows} rows"
        return
    measured = [row for row in ledger.rows if row.evidence == "measured"]
    if measured:
        yield f"kernels that repeat their bits: {_named(measured)} differed when executed twice"
    refuted = {row.op for row in ledger.rows if row.evidence == "refuted" and row.count >= LEAST_CLEAN} - {
        row.op for row in measured
    }
    open_rows = [
        row
        for row in ledger.rows
        if row.evidence not in ("measured", "refuted")
        and row.op not in refuted
        and not _was_at_work(row, equal)
    ]
    if open_rows:
        yield f"a double execution or a replay of steps with {_named(open_rows)}, order-dependent or unknown"


def _was_at_work(row: Row, equal: Sequence[Replay]) -> bool:
    """Whether steps that were found equal lie where ``row`` was seen."""
    return any(row.first_step <= each.steps[1] and row.last_step > each.steps[0] for each in equal)


def _named(rows: Sequence[Row]) -> str:
    return listed(sorted({row.op for row in rows}), _SHOWN)


def _other_world(evidence: Evidence, replays: Sequence[Replay]) -> Tier:
    equal = [each for each in replays if each.verdict == "equal" and _WORLD.issuperset(each.differing)]
    found = [each for each in equal if each.processes != each.world_size]
    whole = [each for each in found if _covered(evidence, [each])]
    missing = []
    if not whole:
        missing.append("an equal replay with another number of processes, and nothing else changed")
    missing += _in_the_way(evidence, equal)
    if missing:
        return Tier("1b", (), tuple(missing))
    sizes = sorted({each.world_size for each in whole} | {each.processes for each in whole})
    seen = f"seen with {', '.join(map(str, sizes))} processes; other numbers are not covered"
    return Tier("1b", tuple(each.says for each in whole), (), (seen,))


def _floor(replays: Sequence[Replay]) -> Tier:
    reasons: list[str] = []
    good: list[str] = []
    for each in replays:
        floor = each.predicate["floor"]
        if floor is None or each.verdict not in ("equal", "within floor"):
            continue
        lacking = noise_floor.lacks(floor)
        if lacking is None:
            good.append(f"{each.says}; {noise_floor.says(floor)}")
        else:
            reasons.append(f"{each.name}: {lacking}")
    if good:
        return Tier("2", tuple(good), ())
    return Tier(
        "2", (), tuple(reasons) or ("a replay beside a measured noise floor (harness replay --floor)",)
    )


def _claims(evidence: Evidence) -> Tier:
    good = [each for each in evidence.claims if each.seeds >= LEAST_SEEDS and each.stacks >= LEAST_STACKS]
    if good:
        told = (f"{each.name}: {each.seeds} seeds, {each.stacks} stacks" for each in good)
        return Tier("3", tuple(told), ())
    short = [
        f"{each.name} has {each.seeds} seeds on {counted(each.stacks, 'stack')}" for each in evidence.claims
    ]
    wanted = f"a supported claim over {LEAST_SEEDS} seeds and {LEAST_STACKS} stacks (harness report --claims)"
    return Tier("3", (), (wanted, *short[:_SHOWN]))
