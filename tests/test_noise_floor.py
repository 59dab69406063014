"""Every rule of `harness.audit.replay.noise_floor` in the order of its docstring, then the verb."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import toy_task
from conftest import Place
from test_replay import SECTIONS, replay

from harness.audit.replay import noise_floor
from harness.audit.replay import verdict as replay_verdict
from harness.audit.replay.divergence import Divergence
from harness.audit.replay.noise_floor import FACTOR, LEAST, Execution, Measured, Scale
from harness.audit.replay.segment import Segment, Step
from harness.audit.replay.verdict import Replayed

NAME, OTHER = "model.weight", "optimizer.weight.exp_avg"
SCALES = {NAME: Scale(2.0, 10.0, 1e-9), OTHER: Scale(1.0, 1.0, 1e-9)}
UNDECIDED = '''"""A toy whose loss is off by a part in a million, which one nobody knows."""

import os

from toy_task import Toy


class Undecided(Toy):
    def loss(self, model, batch):
        return super().loss(model, batch) * (1 + 1e-6 * int.from_bytes(os.urandom(4)) / 2**32)
'''


def execution(name: str, gap: float, other: float = 0.0) -> Execution:
    """One with bits of its own, so far from the plain one."""
    return Execution(name, name, {NAME: gap, OTHER: other})


def measured(**changes: Any) -> Measured:
    """Five perturbations whose floor is 1e-6 of the update, and changes that are all found."""
    found = [("learning rate", share, execution(share, float(share))) for share in noise_floor.RATES]
    facts = Measured(
        precision="fp32",
        steps=(10, 20),
        bits="plain",
        scales=SCALES,
        recorded={NAME: 0.0, OTHER: 0.0},
        perturbed=[execution(f"number {place}", 2e-6, 1e-7) for place in range(LEAST)],
        changed=[*found, ("one value of one sample", "1", execution("value", 1e-2))],
    )
    return replace(facts, **changes)


def test_a_distance_is_a_share_of_the_update_of_its_tensor() -> None:
    """Oracle: the division by hand; without an update, by the tensor's own size."""
    assert noise_floor.distances({NAME: 4e-6, OTHER: 4e-6}, SCALES) == {NAME: 2e-6, OTHER: 4e-6}
    assert noise_floor.distances({"frozen": 1.0}, {"frozen": Scale(0.0, 4.0, 0.0)}) == {"frozen": 0.25}
    assert noise_floor.whole({NAME: 4e-6, OTHER: 7.0}, SCALES) == pytest.approx(2e-6)


def test_a_floor_is_the_largest_distance_and_no_less_than_half_a_unit_in_the_last_place() -> None:
    """Oracle: 3e-6 over an update of 2, and a round-off of 1e-9 over an update of 1."""
    floors = noise_floor.floors([execution("a", 1e-6), execution("b", 3e-6)], SCALES)
    assert floors == {NAME: 1.5e-6, OTHER: 1e-9}


def test_a_perturbation_counts_once_and_not_with_the_bits_of_the_plain_execution() -> None:
    """Oracle: of four two have bits of their own, and the others are listed as such."""
    one = execution("one", 1e-6)
    same, plain = replace(one, name="again"), Execution("plain", "plain", {NAME: 0.0, OTHER: 0.0})
    facts = noise_floor.document(measured(perturbed=[one, same, plain, execution("two", 2e-6)]))
    assert facts["samples"] == 2
    assert [each["own"] for each in facts["members"]] == [True, False, False, True]
    assert "2 independent perturbations, 5 are the least" in str(noise_floor.lacks(facts))


@pytest.mark.parametrize(
    ("gap", "other", "within"),
    [(0.0, 0.0, True), (5.9e-6, 0.0, True), (6.1e-6, 0.0, False), (0.0, 3.1e-7, False), (math.nan, 0, False)],
)
def test_the_record_lies_within_three_floors_in_every_tensor(gap: float, other: float, within: bool) -> None:
    """Oracle: the floors are 2e-6 and 1e-7, before the division by the update."""
    assert FACTOR == 3
    facts = noise_floor.document(measured(recorded={NAME: gap, OTHER: other}))
    assert (noise_floor.lacks(facts) is None) == within


def test_a_member_beyond_the_floor_of_the_others_is_told() -> None:
    """Oracle: ten times as far as the four others."""
    members = [*measured().perturbed[1:], execution("far", 2e-5)]
    apart = {
        each["name"]: each["apart"] for each in noise_floor.document(measured(perturbed=members))["members"]
    }
    assert [name for name, each in apart.items() if each] == ["far"]


def test_the_least_change_is_the_smallest_rate_down_to_which_all_are_found() -> None:
    """Oracle: found are changes over 6e-6; the one below hides although a smaller one would show."""
    gaps = dict(zip(noise_floor.RATES, (1.0, 1e-1, 1e-2, 1e-6, 1e-3), strict=True))
    changed = [("learning rate", share, execution(share, gap)) for share, gap in gaps.items()]
    assert noise_floor.document(measured())["detectable"]["least"] == "0.00001"
    found = noise_floor.document(measured(changed=changed))["detectable"]
    assert [each["found"] for each in found["tried"]] == [True, True, True, False, True]
    assert found["least"] == "0.001"
    nothing = [("learning rate", share, execution(share, 0.0)) for share in noise_floor.RATES]
    assert "none of the known changes" in str(
        noise_floor.lacks(noise_floor.document(measured(changed=nothing)))
    )


@pytest.mark.parametrize(
    ("changes", "weak"),
    [
        ({}, False),
        ({"precision": "bf16"}, True),
        ({"changed": [("learning rate", "0.1", execution("rate", 1.0))]}, True),
        (
            {"changed": [*measured().changed[:-1], ("one value of one sample", "1", execution("v", 0.0))]},
            True,
        ),
    ],
)
def test_it_is_weak_in_other_precisions_and_where_a_small_change_is_not_found(
    changes: dict[str, Any], weak: bool
) -> None:
    """Oracle: the three reasons, one at a time; the word on the screen."""
    facts = noise_floor.document(measured(**changes))
    assert facts["weak"] is weak
    assert ("weak" in noise_floor.says(facts)) is weak


def judged(recorded: float, *, floor: bool = True, differs: bool = True, **other: str) -> tuple[str, str]:
    """Verdict and reason on two steps whose loss differs, and in step 2 what ``other`` says."""
    lines = [{"step": step, "batch": "b", "rng": "r", "loss": 1.0} for step in (1, 2)]
    steps = tuple(Step(line["step"], line) for line in lines)
    segment = Segment.__new__(Segment)
    object.__setattr__(segment, "steps", steps)
    again = [{**lines[0], "loss": 1.5}, {**lines[1], **other}]
    stack = [{"what": "stack.torch", "before": "2.12", "after": "2.13"}] if differs else []
    facts = noise_floor.document(measured(recorded={NAME: recorded, OTHER: 0.0}))
    outcome = replay_verdict.judge(
        segment,
        Replayed(again, 1, stack),
        Divergence(1, ("loss",), 1),
        None if differs else replay_verdict.Repeated(1, 4, 2, ()),
        facts if floor else None,
    )
    return outcome.verdict, outcome.reason


def test_a_floor_decides_only_where_bits_may_differ() -> None:
    """Oracle: the rule: near on another stack is within, far is outside; on the signed stack, whose bits
    repeat, near is outside as well; without a floor nothing is known."""
    assert judged(1e-6)[0] == "within floor"
    assert "would have found learning rate 0.00001" in judged(1e-6)[1]
    assert judged(1e-5)[0] == "outside"
    assert judged(1e-6, differs=False)[0] == "outside"
    assert judged(1e-6, floor=False)[0] == "inconclusive"


def test_samples_and_random_numbers_of_later_steps_are_compared_as_well() -> None:
    """Oracle: the step after the first difference: other samples are outside, other draws say nothing."""
    verdict, reason = judged(1e-6, batch="c")
    assert (verdict, "samples of step 2" in reason) == ("outside", True)
    verdict, reason = judged(1e-6, rng="s")
    assert (verdict, "random numbers of step 2" in reason) == ("inconclusive", True)


@pytest.mark.slow
def test_a_run_whose_last_bits_nobody_repeats_is_within_a_measured_floor(place: Place) -> None:
    """Oracle: `harness verify`, which computes tier 2 from the signed numbers; of a segment that ends between
    two checkpoints no distance can be measured."""
    (place.root / "undecided.py").write_text(UNDECIDED)
    task = '{kind: "undecided:Undecided", options: {plain: true}}'
    sections = {**SECTIONS, "checkpoint": "{every: 6}"}
    place.write("toy.yaml", toy_task.config(place.run, **sections, task=task, evaluate="{every: 0}"))
    assert place.harness("train", "toy.yaml").code == 0
    refused, _ = replay(place, "--from", "6", "--to", "11", "--floor")
    assert (refused.code, "use --to 12" in refused.err) == (2, True)
    done, (segment,) = replay(place, "--from", "6", "--to", "12", "--floor")
    assert (done.code, segment["verdict"]) == (0, "within floor"), segment["reason"]
    # The operator that the unknown factor reaches first, in the task's own line.
    assert segment["suspects"][0]["op"] == "aten.mul"
    assert "undecided.py" in segment["first_divergence"]["where"]
    floor = segment["floor"]
    assert floor["samples"] >= LEAST
    assert {each["name"] for each in floor["tensors"]} >= {"model.0.weight", "optimizer.0.weight.exp_avg"}
    assert floor["detectable"]["least"] is not None
    keys = sorted(str(path) for path in (place.root / "config" / "harness").glob("*.pub"))
    verified = place.harness("verify", str(place.run), "--key", *keys, "--json")
    tiers = json.loads(verified.out)["repeatability"]["tiers"]
    assert [each["held"] for each in tiers if each["tier"] == "2"] == [True], tiers
