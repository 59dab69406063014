"""What a replay came to: pure rules from facts to a verdict, its predicate and its screen.

- ``equal``: every compared fact of every step has the recorded bits
- ``outside``: it has not, although the stack is the signed one and this machine repeats its own bits; or the
  samples themselves are others, which no stack explains
- ``inconclusive``: bits differ, and the stack, the number of processes or a kernel that does not repeat
  itself may be the reason
- ``within floor``: they differ for such a reason, samples and random numbers do not, and no tensor is farther
  from the record than a measured noise floor allows (`harness.audit.replay.noise_floor`); ``outside`` when
  one is

That a loss looks the same is never a reason. A good verdict says that the record follows from the signed
start, code and data; it does not say that the data are what somebody claims.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from harness.audit.replay import noise_floor
from harness.audit.replay.divergence import Divergence
from harness.audit.replay.segment import Segment
from harness.errors import visible
from harness.format import moments
from harness.terminal import Style, style

PREDICATE_TYPE = "urn:harness:predicate:replay/v1"
KIND = "replay"

Verdict = Literal["equal", "within floor", "outside", "inconclusive"]
EXIT: dict[Verdict, int] = {"equal": 0, "within floor": 0, "outside": 1, "inconclusive": 4}
_COLOURS: dict[Verdict, Style] = {
    "equal": "green", "within floor": "green", "outside": "red", "inconclusive": "yellow",
}  # fmt: skip
_STACK_FREE = "batch"
"""The fact that no stack and no world size may change."""
_SHOWN = 5


@dataclass(frozen=True)
class Replayed:
    """What the second execution gave."""

    steps: Sequence[Mapping[str, Any]]
    """Facts as in metrics.jsonl."""
    world_size: int
    differences: Sequence[Mapping[str, str]]
    """What of stack and world size is not as signed: ``what``, ``before``, ``after``."""
    nonfinite: str | None = None
    """Why it stopped, when a number was not finite."""


@dataclass(frozen=True)
class Place:
    """An operator that gave other bits for the same arguments."""

    op: str
    module: str | None
    site: str | None
    """File, line and function of the call."""
    ulp: int | None
    """Largest distance seen, in units in the last place."""
    source: str
    rank: int

    @property
    def where(self) -> str:
        """``aten.index_put in blocks.0 at model.py:8 forward (backward)``."""
        module = f" in {self.module}" if self.module else ""
        return f"{self.op}{module}" + (f" at {self.site}" if self.site else "")

    @property
    def says(self) -> str:
        """It, how far, and how it was found."""
        far = "" if self.ulp is None else f", up to {self.ulp} ULP"
        return f"{self.where}{far}, on rank {self.rank}; {self.source}"


@dataclass(frozen=True)
class Repeated:
    """What executing one step several times from the same state gave."""

    step: int
    repeats: int
    tensors: int
    varying: Sequence[str]
    """Parameters whose gradient had different bits."""
    places: Sequence[Place] = ()
    """Operators that were found to make the difference, by micro-batches executed twice."""


@dataclass(frozen=True)
class Outcome:
    """The verdict on one segment."""

    segment: Segment
    replayed: Replayed
    divergence: Divergence | None
    repeated: Repeated | None
    verdict: Verdict
    reason: str
    floor: Mapping[str, Any] | None = None
    """As in the statement; None when it was not measured."""

    @property
    def compared(self) -> dict[str, int]:
        """Fact → steps in which the recorded one was compared."""
        names = ("batch", "rng", "loss", "grad_norm", "gradients", "state")
        taken = [self.segment.steps[at].facts for at in range(len(self.replayed.steps))]
        return {name: sum(each.get(name) is not None for each in taken) for name in names}


def judge(
    segment: Segment,
    replayed: Replayed,
    divergence: Divergence | None,
    repeated: Repeated | None,
    floor: Mapping[str, Any] | None = None,
) -> Outcome:
    """The verdict. ``repeated`` is wanted when there is a divergence on an equal stack."""
    verdict, reason = _judged(segment, replayed, divergence, repeated)
    whole = divergence is not None and len(replayed.steps) == len(segment.steps)
    if floor is not None and whole and verdict == "inconclusive":
        verdict, reason = _against(floor, _other_draws(segment, replayed), reason)
    return Outcome(segment, replayed, divergence, repeated, verdict, reason, floor)


def _other_draws(segment: Segment, replayed: Replayed) -> int | None:
    """The first step with other random numbers."""
    return _first_other("rng", segment, replayed)


def _first_other(name: str, segment: Segment, replayed: Replayed) -> int | None:
    pairs = zip(segment.steps, replayed.steps, strict=False)
    return next((step.number for step, again in pairs if step.facts.get(name) != again.get(name)), None)


def _against(floor: Mapping[str, Any], draws: int | None, reason: str) -> tuple[Verdict, str]:
    """The verdict of the noise floor on a record whose bits differ for ``reason``."""
    if draws is not None:
        return "inconclusive", f"{reason}; random numbers of step {draws} are others, so no floor applies"
    lacking = noise_floor.unusable(floor)
    if lacking is not None:
        return "inconclusive", f"{reason}; the noise floor says nothing: {lacking}"
    wide = noise_floor.beyond(floor)
    if wide is not None:
        return "outside", f"{reason}; but the record is {wide}, {noise_floor.FACTOR} times which is allowed"
    return "within floor", f"{reason}; {noise_floor.says(floor)}"


def _judged(
    segment: Segment, replayed: Replayed, divergence: Divergence | None, repeated: Repeated | None
) -> tuple[Verdict, str]:
    count = len(segment.steps)
    if divergence is None and replayed.nonfinite is not None:
        return "outside", f"the record goes on where the replay does not: {replayed.nonfinite}"
    if divergence is None and len(replayed.steps) < count:
        return "inconclusive", f"only {len(replayed.steps)} of {count} steps were executed again"
    if divergence is None:
        also = "" if not replayed.differences else ", although the stack or the number of processes differs"
        return "equal", f"all {count} steps have the recorded bits{also}"
    what = f"step {divergence.step} differs first, in {divergence.what}"
    foreign = _first_other(_STACK_FREE, segment, replayed)
    if foreign is not None:
        return "outside", f"{what}; the samples of step {foreign} are others, which no stack explains"
    if replayed.differences:
        return "inconclusive", f"{what}; bits may differ, since this is not the signed stack or world size"
    if repeated is None:
        return "inconclusive", f"{what}; whether this machine repeats its own bits was not looked at"
    if repeated.varying:
        names = ", ".join(repeated.varying[:_SHOWN])
        return "inconclusive", f"{what}; this machine does not repeat its own bits in that step: {names}"
    return "outside", (
        f"{what}; the stack is the signed one, and {repeated.repeats} executions of that step from one state "
        f"agree in all {repeated.tensors} gradients"
    )


def predicate(outcome: Outcome, environment: Mapping[str, Any], harness: str) -> dict[str, Any]:
    """The predicate ``replay/v1``; no floats."""
    segment, replayed, divergence = outcome.segment, outcome.replayed, outcome.divergence
    start = segment.start
    linked = [] if start is None else [_named(start.checkpoint_id, start.statement.step_to)]
    linked.append(_named(segment.end.checkpoint_id, segment.end.statement.step_to))
    facts = {
        "world_size": replayed.world_size,
        "repeats": 0 if outcome.repeated is None else outcome.repeated.repeats,
        "queries": 0 if divergence is None else divergence.queries,
    }
    return {
        "verdict": outcome.verdict,
        "reason": outcome.reason,
        "steps": {"from": segment.first, "to": segment.last},
        "started_from": linked[0] if start is not None else None,
        "compared": [_compared(outcome, name, count) for name, count in outcome.compared.items() if count],
        "first_divergence": None
        if divergence is None
        else {"step": divergence.step, "what": divergence.what, "where": _where(outcome)},
        "suspects": _suspects(outcome),
        "fingerprint": {
            "same": not replayed.differences,
            "differences": [dict(each) for each in replayed.differences],
        },
        "floor": outcome.floor,
        "checkpoints": linked,
        "replayer": {"harness": harness, "environment": {**environment, **facts}},
        "created": moments.now(),
    }


def _named(identity: str, step: int) -> dict[str, Any]:
    return {"checkpoint": identity, "step": step}


def _compared(outcome: Outcome, name: str, count: int) -> dict[str, Any]:
    """The last recorded and replayed value of a fact up to the end, or to the divergence when it has it."""
    divergence = outcome.divergence
    differs = divergence is not None and name in divergence.parts
    at = len(outcome.replayed.steps) - 1
    if differs and divergence is not None:
        at = divergence.step - outcome.segment.first - 1
    recorded, replayed = outcome.segment.steps[at].facts.get(name), outcome.replayed.steps[at].get(name)
    return {
        "what": name,
        "count": count,
        "equal": not differs,
        "recorded": None if recorded is None else str(recorded),
        "replayed": None if replayed is None else str(replayed),
    }


def _suspects(outcome: Outcome) -> list[dict[str, str]]:
    repeated = outcome.repeated
    if repeated is None:
        return []
    reason = f"{repeated.repeats} executions of step {repeated.step} from one state gave other gradients"
    found = [{"op": each.op, "evidence": "measured", "reason": each.says} for each in repeated.places]
    return found + [{"op": name, "evidence": "measured", "reason": reason} for name in repeated.varying]


def _where(outcome: Outcome) -> str | None:
    repeated = outcome.repeated
    return repeated.places[0].where if repeated is not None and repeated.places else None


def render(outcome: Outcome, written: str) -> str:
    """The screen; ``written`` says where the signed verdict is."""
    segment, divergence, repeated = outcome.segment, outcome.divergence, outcome.repeated
    source = "the beginning of the run" if segment.start is None else segment.start.folder.name
    lines = [
        f"{style(outcome.verdict, _COLOURS[outcome.verdict])}  steps {segment.first + 1} to {segment.last} "
        f"of {visible(str(segment.run.root))}, executed again from {source}",
        _line("reason", outcome.reason),
        _line("compared", ", ".join(f"{name} {count}" for name, count in outcome.compared.items() if count)),
        _line("processes", f"{outcome.replayed.world_size}, signed {segment.facts['launch']['world_size']}"),
    ]
    if divergence is not None:
        queries = f"step {divergence.step}, found with {divergence.queries} comparisons of the chain"
        lines.append(_line("first", f"{queries}; differs in {', '.join(divergence.parts)}"))
    if repeated is not None:
        told = ", ".join(repeated.varying[:_SHOWN]) or "no gradient"
        lines.append(_line("repeated", f"step {repeated.step}, {repeated.repeats} times: {told} varies"))
        lines += [_line("operator", each.says) for each in repeated.places[:_SHOWN]]
    lines += [
        _line("differs", f"{each['what']}: {each['before']} → {each['after']}")
        for each in outcome.replayed.differences[:_SHOWN]
    ]
    if outcome.floor is not None:
        lines += [_line(label, text) for label, text in noise_floor.lines(outcome.floor)]
    return "\n".join([*lines, _line("written", written)])


def _line(label: str, text: str) -> str:
    return f"  {label:<10} {visible(text)}"
