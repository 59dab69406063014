"""Clipping and the gradient norm, against torch's own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness.training import optimizer

SHAPES = [(3,), (4, 5), (1,), (2, 3, 4)]


def gradients(seed: int, scale: float) -> list[torch.Tensor]:
    """Random tensors of several shapes."""
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(shape, generator=generator) for shape in SHAPES]


@given(seed=st.integers(0, 1000), scale=st.floats(1e-6, 1e6), clip=st.none() | st.floats(1e-3, 1e3))
def test_norm_and_clipping_are_torchs_bit_for_bit(seed: int, scale: float, clip: float | None) -> None:
    """Oracle: `torch.nn.utils.clip_grad_norm_` on the same gradients."""
    ours = gradients(seed, scale)
    parameters = [torch.nn.Parameter(torch.zeros_like(each)) for each in ours]
    for parameter, gradient in zip(parameters, ours, strict=True):
        parameter.grad = gradient.clone()
    limit = float("inf") if clip is None else clip
    expected = torch.nn.utils.clip_grad_norm_(parameters, limit)
    norm = optimizer.gradient_norm(ours)
    assert torch.equal(norm, expected)
    if clip is not None:
        optimizer.scale(ours, optimizer.clip_factor(norm, clip))
    for parameter, gradient in zip(parameters, ours, strict=True):
        assert parameter.grad is not None
        assert torch.equal(gradient, parameter.grad)


@pytest.mark.parametrize("clip", [None, 0.5])
def test_gradients_of_several_dtypes_are_clipped_together(clip: float | None) -> None:
    """Oracle: the norm of all of them in float64."""
    ours = [torch.full((4,), 2.0), torch.full((4,), 2.0, dtype=torch.float64)]
    norm = optimizer.gradient_norm(ours)
    if clip is not None:
        optimizer.scale(ours, optimizer.clip_factor(norm, clip))
    assert norm.item() == pytest.approx(32**0.5)
    after = sum(float(each.double().square().sum()) for each in ours) ** 0.5
    assert after == pytest.approx(clip or 32**0.5, rel=1e-5)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_broken_gradient_shows_in_the_norm(broken: float) -> None:
    """Oracle: arithmetic."""
    ours = [torch.ones(3), torch.tensor([1.0, broken])]
    assert not torch.isfinite(optimizer.gradient_norm(ours))


def test_weight_decay_spares_vectors() -> None:
    """Oracle: the groups of the optimizer."""
    from harness.settings import Optimizer

    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    made = optimizer.adamw(model, Optimizer(weight_decay=0.3))
    decay = {group["weight_decay"]: {each.ndim for each in group["params"]} for group in made.param_groups}
    assert decay == {0.3: {2}, 0.0: {1}}
    assert all(group["fused"] for group in made.param_groups)


def test_eager_updates_are_torchs_bit_for_bit() -> None:
    """Oracle: `torch.optim.AdamW`, weights and moments after 5 updates."""
    made = []
    for kind in (optimizer.EagerAdamW, torch.optim.AdamW):
        weights = [torch.nn.Parameter(each) for each in gradients(1, 1.0)]
        ours = kind(weights, lr=0.1, weight_decay=0.1, fused=True)
        for update in range(5):
            ours.zero_grad(set_to_none=True)
            for weight, gradient in zip(weights, gradients(2 + update, 1.0), strict=True):
                weight.grad = gradient
            ours.step()
        moments = [ours.state[each][name] for each in weights for name in ("exp_avg", "exp_avg_sq", "step")]
        made.append([*weights, *moments])
    assert all(map(torch.equal, *made))
