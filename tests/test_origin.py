"""Where a value that is not finite comes from, one planted cause at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from harness.determinism import origin as origins
from harness.determinism.origin import Origin, first_origin

INFINITE = float("-inf")


class Cause(nn.Module):
    """A linear layer, and a function after it."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.function = nn.Linear(4, 4), function

    def forward(self, x: Tensor) -> Tensor:
        """(3, 4) to a scalar."""
        return self.function(self.linear(x)).sum()


def attention(x: Tensor, masked: Tensor) -> Tensor:
    """Weights of rows over rows, those ``masked`` left out."""
    return torch.softmax((x @ x.T).masked_fill(masked, INFINITE), -1)


def masked_whole(x: Tensor) -> Tensor:
    return attention(x, torch.ones(3, 3, dtype=torch.bool))


def masked_and_logarithm(x: Tensor) -> Tensor:
    return attention(x, torch.ones(3, 3).triu(1).bool()).sum() + (x * 0).log()


def added_mask(x: Tensor) -> Tensor:
    return torch.softmax(x @ x.T + torch.full((3, 3), INFINITE).triu(1), -1)


def overflow(x: Tensor) -> Tensor:
    large = (x * 0 + 1000).exp()
    return large - large


def root(x: Tensor) -> Tensor:
    return (x * 0).sum().sqrt()


def guarded(x: Tensor) -> Tensor:
    return torch.where(x > 1e9, x, (x * 0).log() * 0).nan_to_num() + (x * 0 - 1).sqrt()


def unwritten(x: Tensor) -> Tensor:
    return x + 2 * torch.empty_like(x)


CASES = [
    (masked_whole, "aten.softmax", "attention", "9 of 9 elements are nan, out of infinities that were meant"),
    (masked_and_logarithm, "aten.log", "masked_and_logarithm", "12 of 12 elements are inf, out of finite"),
    (overflow, "aten.exp", "overflow", "12 of 12 elements are inf, out of finite arguments"),
    (root, "aten.div", "root (backward)", "its result is inf, out of finite arguments"),
    (guarded, "aten.sqrt", "guarded", "12 of 12 elements are nan, out of finite arguments"),
]


def found(model: nn.Module) -> Origin | None:
    """In a forward and backward pass of ``model``."""

    def execute() -> Tensor:
        loss: Tensor = model(torch.ones(3, 4))
        loss.backward()
        return loss.detach()

    torch.manual_seed(0)
    return first_origin(execute, model)


@pytest.mark.parametrize(("function", "op", "place", "source"), CASES)
def test_the_operator_that_first_made_it_of_finite_arguments_is_named(
    function: Callable[[Tensor], Tensor], op: str, place: str, source: str
) -> None:
    """Oracle: the operator that the function plants, and the function that calls it."""
    made = found(Cause(function))
    assert made is not None
    assert (made.op, made.module) == (op, "Cause")
    assert made.source.startswith(source)
    assert (made.call_site or "").startswith("test_origin.py:")
    assert (made.call_site or "").endswith(place)


@pytest.mark.parametrize("function", [lambda x: x, added_mask])
def test_finite_losses_and_gradients_have_no_origin(function: Callable[[Tensor], Tensor]) -> None:
    """Oracle: a loss without a NaN, with and without infinities that are meant."""
    assert found(Cause(function)) is None


def test_a_parameter_that_was_not_finite_before_is_named() -> None:
    """Oracle: the parameter into which a NaN was written."""
    model = Cause(lambda x: x)
    with torch.no_grad():
        model.linear.bias[1] = float("nan")
    made = found(model)
    assert made is not None
    assert (made.op, made.module, made.source) == ("parameter", "linear.bias", "was not finite before")


def test_memory_that_nobody_has_written_is_named_by_who_made_it() -> None:
    """Oracle: strict mode, in which torch fills what it leaves uninitialised with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        made = found(Cause(unwritten))
    finally:
        torch.use_deterministic_algorithms(False)
    assert made is not None
    assert (made.op, made.source) == (
        "aten.empty_like",
        "aten.mul reads memory that aten.empty_like left uninitialised",
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64])
def test_every_dtype_that_has_a_nan_shows_it(dtype: torch.dtype) -> None:
    """Oracle: one NaN among ones."""
    values = torch.ones(5)
    assert origins.not_finite(values.to(dtype)) is None
    values[2] = float("nan")
    assert origins.not_finite(values.to(dtype)) == "nan"
    assert origins.not_finite(torch.ones(3, dtype=torch.int64)) is None
