"""A non-finite number stops the run before the optimizer has used it."""

from __future__ import annotations

import pytest
import torch

from harness.training.step.readback import NonFinite, Readback

CPU = torch.device("cpu")


def readback(scaled: bool = False) -> Readback:
    return Readback(CPU, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1), scaled=scaled)


def test_values_come_out_once_and_in_order() -> None:
    """Oracle: the numbers that went in."""
    box = readback()
    for step in (1, 2):
        box.push(step, torch.tensor(1.5 * step), torch.tensor(0.5))
        values = box.collect()
        assert [(value.step, value.loss, value.norm) for value in values] == [(step, 1.5 * step, 0.5)]
        assert box.collect() == []
        assert box.drain() == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_loss_or_norm_is_raised_with_its_step(bad: float) -> None:
    """Oracle: math.isfinite."""
    with pytest.raises(NonFinite, match="loss of step 7"):
        readback().push(7, torch.tensor(bad), torch.tensor(1.0))
    with pytest.raises(NonFinite, match="gradient norm of step 7"):
        readback().push(7, torch.tensor(1.0), torch.tensor(bad))


def test_under_a_loss_scaler_an_infinite_norm_only_skips_the_step() -> None:
    """Oracle: dynamic loss scaling expects overflows (arXiv 1710.03740) and skips those steps."""
    box = readback(scaled=True)
    box.push(1, torch.tensor(2.0), torch.tensor(float("inf")))
    assert box.collect()[0].norm is None
    with pytest.raises(NonFinite, match="loss"):
        box.push(2, torch.tensor(float("nan")), None)
