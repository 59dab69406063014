"""The value of a run that a claim or table is about: of an evaluation while it trained, or one signed later.

- a claim without `evaluation` means the figure of metrics.jsonl when any of its runs has one of that name
- otherwise the test-results that a verification has accepted, of the run's last step unless `evaluation`
  names another; between two that were measured differently nothing is chosen, and the run has no value
- what was asked (suite, decoding, prompts) is kept apart from what it was asked with (`APPARATUS`): values
  that answer different questions are never put together
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from harness.report import facts
from harness.report.arms import Arm
from harness.report.claim_file import TRAIN_LOSS, Claim, Settings
from harness.report.runs import Evaluated, Run

TRAINING = "loss (train)"
STEP = "step"
STACK = ("setting.device", "setting.threads", "setting.torch")
"""Of how an evaluation was measured, what a machine brings."""
DATA = ("dataset", "split", "sha256", "examples")
"""What it was measured on."""
PRECISION = "setting.precision"
APPARATUS = frozenset(
    [*STACK, PRECISION, "version", "setting.task", "setting.lm_eval"]
    + [f"setting.{name}" for name in ("limit", "truncated", "examples_a_pass")]
)
"""What an evaluation was measured with; everything else that it says of itself is what was asked."""
_LONGEST = 12
"""Digits of a digest in a label."""


@dataclass(frozen=True)
class Found:
    """What a finished run has to say about a figure."""

    run: Run
    value: float | None
    """None when ``remark`` says why there is none."""
    remark: str | None = None
    how: Mapping[str, str] = field(default_factory=dict)
    """How a signed evaluation was measured; empty for one while training."""
    evidence: Evaluated | None = None
    """The signed evaluation that ``value`` is of; None for one while training."""

    @property
    def asked(self) -> Mapping[str, str]:
        """Of ``how``, what decides which question the value answers."""
        return _asked(self.how)


@dataclass(frozen=True)
class Side:
    """The runs of one arm of a comparison."""

    arm: Arm
    found: tuple[Found, ...]
    """Of its runs that finished."""

    @property
    def values(self) -> dict[int, float]:
        """Seed → value."""
        return {facts.seed(each.run): each.value for each in self.found if each.value is not None}

    @property
    def without(self) -> list[Found]:
        """Those that have no value."""
        return [each for each in self.found if each.value is None]


@dataclass(frozen=True)
class Measure:
    """A figure that runs can be compared by."""

    metric: str
    label: str
    evaluation: Settings | None = None
    """What a signed evaluation must say of itself; None for a figure of metrics.jsonl."""
    exactly: bool = False
    """Whether it must have been asked nothing but ``evaluation``."""

    def of(self, run: Run) -> Found:
        """Its value in ``run``."""
        return _trained(run, self.metric) if self.evaluation is None else self._signed(run, self.evaluation)

    def side(self, arm: Arm) -> Side:
        """Its values in the runs of ``arm`` that finished."""
        return Side(arm, tuple(self.of(run) for run in arm.runs if facts.ending(run).kind == "good"))

    def _signed(self, run: Run, evaluation: Settings) -> Found:
        """The newest of the evaluations that are meant; they must have been measured alike."""
        asked = {name: facts.shown(value) for name, value in evaluation.items()}
        wanted = {STEP: str(run.last_step)} | asked
        there = [(each, dict(_how(each))) for each in run.evaluated if self.metric in each.metrics]
        told = [{**how, STEP: str(each.step)} for each, how in there]
        meant = [
            one
            for one, says in zip(there, told, strict=True)
            if wanted.items() <= says.items() and (not self.exactly or _asked(one[1]) == asked)
        ]
        if not meant:
            at_step = [says for says in told if says[STEP] == wanted[STEP]]
            if not at_step:
                return Found(run, None, f"no verified evaluation of step {wanted[STEP]} has it")
            return Found(run, None, f"what is verified of step {wanted[STEP]} {_misses(at_step, wanted)}")
        apart = _apart([how for _, how in meant])
        if apart:
            what = f"{len(meant)} evaluations that differ in {', '.join(apart)} have it"
            return Found(run, None, what if self.exactly else f"{what}: say which in `evaluation`")
        values = [each.metrics[self.metric] for each, _ in meant]
        if not math.isfinite(values[-1]):
            return Found(run, None, "it is not finite")
        twice = (
            f"it was measured {len(values)} times, from {min(values):.4g} to {max(values):.4g}; "
            "the last counts"
        )
        last, how = meant[-1]
        return Found(run, values[-1], twice if len(set(values)) > 1 else None, how, last)


def measures(runs: Sequence[Run]) -> list[Measure]:
    """Every figure that any of ``runs`` has: the training loss, those of evaluations while training, then
    those of signed evaluations of a last step, one for each question that was asked."""
    names = dict.fromkeys(name for run in runs for name in run.evaluation_names)
    questions: dict[str, list[tuple[str, Mapping[str, str]]]] = {}
    for run in runs:
        for each in run.evaluated:
            for metric in each.metrics if each.step == run.last_step else ():
                asked = _asked(dict(_how(each)))
                known = questions.setdefault(f"{metric} ({_called(asked)})", [])
                if (metric, asked) not in known:
                    known.append((metric, asked))
    signed = [
        Measure(metric, _label(label, asked, [each for _, each in known]), asked, exactly=True)
        for label, known in questions.items()
        for metric, asked in known
    ]
    return [Measure(TRAINING, TRAINING), *(Measure(name, f"held-out {name}") for name in names), *signed]


def _misses(there: Sequence[Mapping[str, str]], wanted: Mapping[str, str]) -> str:
    """In what evaluations are others than the one that is wanted."""
    apart = [name for name in wanted if not any(says.get(name) == wanted[name] for says in there)]
    if not apart:
        return "was asked something else"
    name = apart[0]
    found = ", ".join(sorted({_shortened(name, says.get(name, "not recorded")) for says in there}))
    return f"is of {name} {found}, not {_shortened(name, wanted[name])}"


def _called(asked: Mapping[str, str]) -> str:
    """What a person calls the suite."""
    named = [asked[name] for name in ("dataset", "split") if name in asked]
    return ", ".join(named) or asked["procedure"]


def _label(label: str, asked: Mapping[str, str], others: Sequence[Mapping[str, str]]) -> str:
    """``label``, with what tells this question from ``others`` of the same name."""
    differing = _apart(others)
    if not differing:
        return label
    told = (f"{name.rpartition('.')[2]} {_shortened(name, asked.get(name, '—'))}" for name in differing)
    return f"{label.removesuffix(')')}; {', '.join(told)})"


def _shortened(name: str, value: str) -> str:
    return value[:_LONGEST] if name.endswith("sha256") else value


def sides(claim: Claim, arms: Sequence[Arm]) -> list[Side]:
    """What the runs of ``arms`` have to say about ``claim``."""
    name = TRAINING if claim.metric == TRAIN_LOSS else claim.metric
    runs = [run for arm in arms for run in arm.runs]
    training = claim.evaluation is None and (
        claim.metric == TRAIN_LOSS or any(name in run.evaluation_names for run in runs)
    )
    measure = Measure(name, name, None if training else claim.evaluation or {})
    return [measure.side(arm) for arm in arms]


def evidence(found: Sequence[Side]) -> list[tuple[Run, Evaluated]]:
    """The signed evaluations that the values of all sides are of."""
    return [(each.run, each.evidence) for side in found for each in side.found if each.evidence is not None]


def differing(found: Sequence[Side]) -> list[str]:
    """In what the signed evaluations of all sides were measured differently."""
    return _apart([each.how for side in found for each in side.found if each.how])


def asked_differently(found: Sequence[Side], *, any_data: bool) -> list[str]:
    """In what the signed evaluations of all sides were asked differently, so that no value stands beside
    another; with ``any_data`` suites may differ from seed to seed, and a seed has the same on both sides."""
    asked = [each.asked for side in found for each in side.found if each.how]
    if not any_data:
        return _apart(asked)
    by_seed = [
        {facts.seed(each.run): {name: each.asked.get(name, "—") for name in DATA} for each in side.found}
        for side in found
    ]
    apart = _apart(asked)
    paired = all(seeds == by_seed[0] for seeds in by_seed)
    return [name for name in apart if name not in DATA] if paired else apart


def datasets(found: Sequence[Side]) -> set[str]:
    """Digests of what signed evaluations were measured on."""
    return _seen([each.how for side in found for each in side.found if each.how], "sha256")


def _asked(how: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in how.items() if name not in APPARATUS}


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
