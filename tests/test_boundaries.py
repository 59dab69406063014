"""The same model with and without FSDP2: what is added up where, and what FSDP2 cannot do, by its name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from harness.errors import ConfigError, TrainingFailed
from harness.training.elastic import boundaries, unfit
from harness.training.optimizer import local
from harness.training.step import building, cutting


class Block(nn.Module):
    """Attention's cousin: its input is used more than once, beside one from further below."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)

    def forward(self, x: Tensor, *, below: Tensor) -> Tensor:
        return x + torch.tanh(self.inner(x)) * below


class Branching(nn.Module):
    """Blocks, and branches around them."""

    _no_split_modules = ("Block",)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)
        self.blocks = nn.ModuleList([Block() for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        first = x = torch.sigmoid(self.first(x))
        for block in self.blocks:
            x = block(x, below=first) * x + first
        return self.last(x)  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def gradients(prepare: Callable[[nn.Module], object]) -> list[Tensor]:
    """Of the same loss of the same model, after ``prepare``."""
    torch.manual_seed(1)
    model = Branching()
    prepare(model)
    model(torch.randn(32, 8)).square().sum().backward()
    return [local(each.grad) for each in model.parameters() if each.grad is not None]


def sharded(model: nn.Module) -> nn.Module:
    """Cut by FSDP2, each block a unit."""
    for each in getattr(model, "blocks", ()):
        fully_shard(each)
    fully_shard(model)
    return model


def test_what_a_unit_gives_back_is_added_up_as_fsdp2_does() -> None:
    """Oracle: FSDP2 on one rank, bit for bit; that the bare model has others is why the nodes are there."""
    expected = gradients(sharded)
    assert len(expected) == 8
    both = gradients(lambda model: boundaries.join(sharded(model)))
    for found in (gradients(boundaries.join), both):
        assert all(map(torch.equal, found, expected))
    assert not all(map(torch.equal, gradients(lambda _: None), expected))


def test_what_is_compiled_is_the_same_with_and_without_fsdp2() -> None:
    """Oracle: the blocks, each for itself; with FSDP2 the model was taken, of which a block that is
    checkpointed then ran as it is written."""
    model = Branching()
    blocks = list(model.blocks)
    assert building._units(model) == blocks
    assert building._units(sharded(model)) == blocks


def test_differentiating_twice_under_fsdp2_is_refused_by_the_name_of_the_model() -> None:
    """Oracle: a penalty on the gradient of the input, and of the weights; once, retained, is nothing."""
    for kind in ("input", "weights", "retained"):
        model = sharded(Branching())
        unfit.once(model)
        x = torch.randn(4, 8, requires_grad=True)
        loss = model(x).sum()
        if kind == "retained":
            torch.autograd.grad(loss, x, retain_graph=True)
            continue
        with pytest.raises(TrainingFailed, match=r"`Branching` is differentiated twice \(create_graph=T"):
            torch.autograd.grad(loss, x if kind == "input" else list(model.parameters()), create_graph=True)


def test_weights_that_are_used_past_the_model_under_fsdp2_are_named() -> None:
    """Oracle: the layer that was called by itself."""
    model = sharded(Branching())
    with pytest.raises(TrainingFailed) as raised, unfit.explaining(model):
        model.first(torch.randn(4, 8))  # type: ignore[operator]
    assert "the parameters of `first` are used while FSDP2 has them cut" in str(raised.value)
    assert isinstance(raised.value.__cause__, RuntimeError)
    other = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError) as kept, unfit.explaining(model):
        raise other
    assert kept.value is other
    assert other.__cause__ is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda model: model.register_parameter("none", nn.Parameter(torch.ones(0, 4))), "`none` has no "),
        (lambda model: model.register_parameter("heat", nn.Parameter(torch.tensor(1.0))), "Change heat to a"),
        (lambda model: setattr(model.blocks[0].inner, "bias", nn.Parameter(torch.ones(16).bfloat16())),
         "in one unit `blocks.0.inner.bias` is bfloat16 and `blocks.0.inner.weight` is float32"),
        (lambda model: model.first.register_parameter("weight", nn.Parameter(torch.ones(8, 16).t())),
         "does not support non-contiguous parameters"),
        (lambda model: setattr(model.blocks[1].inner, "bias", model.blocks[0].inner.bias),
         "`blocks.0.inner.bias` is `blocks.1.inner.bias` as well, in another unit"),
    ],
)  # fmt: skip
def test_what_fsdp2_cannot_cut_is_refused_before_the_first_pass(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[nn.Module], object], says: str
) -> None:
    """Oracle: one such parameter in a model of three units."""
    monkeypatch.setattr(cutting, "fsdp2_prepare_model", lambda _, model: sharded(model))
    prepare: Any = None
    assert cutting.cut(Branching(), prepare)
    model = Branching()
    change(model)
    with pytest.raises(ConfigError, match="FSDP2 cannot cut this model") as raised:
        cutting.cut(model, prepare)
    assert says in str(raised.value)
