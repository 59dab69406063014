"""The value of a run that a claim is about: of an evaluation while it trained, or of one signed later.

- a claim without `evaluation` means the figure of metrics.jsonl when any of its runs has one of that name
- otherwise the test-results that a verification has accepted, of the run's last step unless `evaluation`
  names another; between two that were measured differently nothing is chosen, and the run has no value
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from harness.report import claims as facts
from harness.report.arms import Arm
from harness.report.claim_file import TRAIN_LOSS, Claim
from harness.report.runs import Evaluated, Run

STEP = "step"
STACK = ("setting.device", "setting.threads", "setting.torch")
"""Of how an evaluation was measured, what a machine brings."""
DATA = ("dataset", "split", "sha256", "examples")
"""What it was measured on."""


@dataclass(frozen=True)
class Found:
    """What a finished run has to say about a claim."""

    run: Run
    value: float | None
    """None when ``remark`` says why there is none."""
    remark: str | None = None
    how: Mapping[str, str] = field(default_factory=dict)
    """How a signed evaluation was measured; empty for one while training."""


@dataclass(frozen=True)
class Side:
    """The runs of one arm of a claim."""

    arm: Arm
    found: tuple[Found, ...]
    """Of its runs that finished."""

    @property
    def values(self) -> dict[int, float]:
        """Seed → value."""
        return {facts.seed(each.run): each.value for each in self.found if each.value is not None}


def sides(claim: Claim, arms: Sequence[Arm]) -> list[Side]:
    """What the runs of ``arms`` have to say about ``claim``."""
    name = "loss (train)" if claim.metric == TRAIN_LOSS else claim.metric
    runs = [run for arm in arms for run in arm.runs]
    training = claim.evaluation is None and (
        claim.metric == TRAIN_LOSS or any(name in run.evaluation_names for run in runs)
    )
    return [
        Side(
            arm,
            tuple(
                _trained(run, name) if training else _signed(run, claim)
                for run in arm.runs
                if facts.ending(run).kind == "good"
            ),
        )
        for arm in arms
    ]


def differing(found: Sequence[Side]) -> list[str]:
    """In what the signed evaluations of all sides were measured differently."""
    return _apart([each.how for side in found for each in side.found if each.how])


def datasets(found: Sequence[Side]) -> set[str]:
    """Digests of what signed evaluations were measured on."""
    return _seen([each.how for side in found for each in side.found if each.how], "sha256")


def _apart(ways: Sequence[Mapping[str, str]]) -> list[str]:
    return sorted(name for name in {key for way in ways for key in way} if len(_seen(ways, name)) > 1)


def _seen(ways: Sequence[Mapping[str, str]], name: str) -> set[str]:
    return {way.get(name, "—") for way in ways}


def _trained(run: Run, name: str) -> Found:
    value = facts.final(run, name)
    if value is None:
        return Found(run, None, "it was not measured")
    unsigned = None if run.lines_signed else "no checkpoint has signed the lines that it was measured in"
    return Found(run, value, unsigned) if math.isfinite(value) else Found(run, None, "it is not finite")


def _signed(run: Run, claim: Claim) -> Found:
    """The newest of the evaluations that ``claim`` means; they must have been measured alike."""
    wanted = {STEP: str(run.last_step)} | {
        name: facts.shown(value) for name, value in (claim.evaluation or {}).items()
    }
    meant = []
    for each in run.evaluated:
        if claim.metric not in each.metrics:
            continue
        how = dict(_how(each))
        if wanted.items() <= {**how, STEP: str(each.step)}.items():
            meant.append((each, how))
    if not meant:
        return Found(run, None, f"no verified evaluation of step {wanted[STEP]} has it")
    ways = [how for _, how in meant]
    apart = _apart(ways)
    if apart:
        what = (
            f"{len(meant)} evaluations that differ in {', '.join(apart)} have it: say which in `evaluation`"
        )
        return Found(run, None, what)
    values = [each.metrics[claim.metric] for each, _ in meant]
    if not math.isfinite(values[-1]):
        return Found(run, None, "it is not finite")
    twice = (
        f"it was measured {len(values)} times, from {min(values):.4g} to {max(values):.4g}; the last counts"
    )
    return Found(run, values[-1], twice if len(set(values)) > 1 else None, ways[-1])


def _how(one: Evaluated) -> Iterator[tuple[str, str]]:
    """How it was measured, as names and words that a claim can ask for."""
    told = one.facts["harness_evaluation"]
    yield "procedure", told["procedure"]["name"]
    yield "version", told["procedure"]["version"]
    if told["dataset"] is not None:
        yield "dataset", told["dataset"]["name"]
        yield "split", told["dataset"]["split"]
        yield "sha256", str(told["dataset"]["sha256"])
    if told["examples"] is not None:
        yield "examples", str(told["examples"])
    for prefix, table in (("decoding", told["decoding"]), ("setting", told["procedure"]["settings"])):
        for name, value in table.items():
            if name != "items_sha256":  # the results themselves
                yield f"{prefix}.{name}", facts.shown(value)
