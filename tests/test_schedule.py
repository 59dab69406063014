"""The learning rate is a pure function of the step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness.training.schedule import LearningRate


def schedule(kind: str, warmup: int = 10, steps: int = 100, decay: float = 0.2) -> LearningRate:
    return LearningRate(kind, peak=1.0, steps=steps, warmup=warmup, decay=decay, final=0.1)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["constant", "cosine", "wsd"])
def test_warm_up_is_linear_and_reaches_the_peak(kind: str) -> None:
    """Oracle: the definition of linear warm-up."""
    rate = schedule(kind)
    assert [rate(step) for step in range(1, 11)] == pytest.approx([step / 10 for step in range(1, 11)])


def test_cosine_is_torch_cosine_annealing_after_the_warm_up() -> None:
    """Oracle: torch.optim.lr_scheduler.CosineAnnealingLR, which counts its steps from 0."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    peer = torch.optim.SGD([parameter], lr=1.0)
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(peer, T_max=90, eta_min=0.1)
    expected = []
    for _ in range(91):
        expected.append(peer.param_groups[0]["lr"])
        peer.step()
        annealing.step()
    rate = schedule("cosine")
    assert [rate(step) for step in range(10, 101)] == pytest.approx(expected)


def test_wsd_is_flat_then_falls_linearly_to_the_final_share() -> None:
    """Oracle: arXiv 2404.06395, with a linear decay over the last fifth."""
    rate = schedule("wsd")
    assert {rate(step) for step in range(10, 81)} == {1.0}
    falls = [rate(step) - rate(step + 1) for step in range(80, 100)]
    assert falls == pytest.approx([0.9 / 20] * 20)
    assert rate(100) == pytest.approx(0.1)


@given(
    kind=st.sampled_from(["constant", "cosine", "wsd"]),
    steps=st.integers(1, 500),
    warmup=st.integers(0, 500),
    decay=st.floats(0, 0.99),
    data=st.data(),
)
def test_every_rate_lies_between_zero_and_the_peak(
    kind: str, steps: int, warmup: int, decay: float, data: st.DataObject
) -> None:
    """Oracle: a learning rate is positive and never above its peak."""
    rate = schedule(kind, warmup=min(warmup, steps), steps=steps, decay=decay)
    step = data.draw(st.integers(1, steps))
    assert 0.0 < rate(step) <= 1.0 + 1e-12


@pytest.mark.parametrize("warmup", [0, 10])
def test_before_the_first_update_there_is_no_rate(warmup: int) -> None:
    """Oracle: no update has been made; a run that meets a NaN in its first step keeps that state."""
    rate = schedule("cosine", warmup)
    assert rate.document(0) == {"kind": "cosine", "step": 0, "steps": 100, "rate": "0.0"}
    assert rate.document(1)["rate"] == repr(rate(1))
