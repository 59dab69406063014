"""What a step reads, as named tensors and back; strict about every one of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from harness.checkpoint import state
from harness.checkpoint.shards import Group
from harness.checkpoint.state import TrainingState
from harness.errors import TrainingFailed


class Tied(nn.Module):
    """A shared weight, batch statistics, a loose buffer, a frozen and an unused parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Embedding(6, 4)
        self.normal = nn.BatchNorm1d(4)
        self.outer = nn.Linear(4, 6, bias=False)
        self.outer.weight = self.inner.weight
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(3))
        self.register_buffer("calls", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1  # type: ignore[operator]
        return self.outer(self.normal(self.inner(x)))  # type: ignore[no-any-return]


def trained(seed: int, steps: int) -> TrainingState:
    """A model and its AdamW after ``steps`` updates."""
    torch.manual_seed(seed)
    model = Tied()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    made = TrainingState(model, torch.optim.AdamW(trainable, lr=0.1, fused=True), None, {"w": torch.rand(3)})
    for _ in range(steps):
        step(made)
    return made


def step(made: TrainingState) -> None:
    """One update on fixed samples."""
    made.optimizer.zero_grad()
    nn.functional.cross_entropy(made.model(torch.arange(6)), torch.arange(6)).backward()
    made.optimizer.step()


def everything(made: TrainingState) -> dict[str, Tensor]:
    """All tensors that are saved."""
    return {**state.model_tensors(made.model)[0], **state.optimizer_tensors(made)}


@dataclass
class Held:
    """Tensors in memory as a restore finds them: `state.Source`."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor] = field(default_factory=dict)

    def described(self, group: Group) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of each tensor of a group."""
        return {name: (each.dtype, tuple(each.shape)) for name, each in getattr(self, group).items()}

    def fill(self, targets: Mapping[tuple[Group, str], Tensor]) -> None:
        """Copy the tensors into ``targets``."""
        with torch.no_grad():
            for (group, name), target in targets.items():
                target.copy_(getattr(self, group)[name])


def restored(source: TrainingState, target: TrainingState) -> None:
    """Carry what is saved of ``source`` over to ``target``."""
    tensors, aliases = state.model_tensors(source.model)
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    others = {name: tensor.clone() for name, tensor in state.optimizer_tensors(source).items()}
    state.load(target, Held(copies, others), aliases)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_restored_state_takes_the_same_steps(steps: int) -> None:
    """Oracle: the state that was never saved, bit for bit after two more updates."""
    source, target = trained(1, steps), trained(2, 1)
    restored(source, target)
    for _ in range(2):
        step(source)
        step(target)
    ours, theirs = everything(source), everything(target)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_a_shared_weight_is_saved_once_and_named() -> None:
    """Oracle: torch's own state dict, which has it twice."""
    tensors, aliases = state.model_tensors(Tied())
    assert aliases == {"outer.weight": "inner.weight"}
    assert {*tensors, *aliases} == set(Tied().state_dict())


def test_a_buffer_outside_the_state_dict_is_saved_too() -> None:
    """Oracle: the number of calls."""
    assert state.optimizer_tensors(trained(1, 3))["buffer.calls"].item() == 3


CHANGES: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "missing": (lambda tensors: tensors.pop("inner.weight"), "1 missing"),
    "unknown": (lambda tensors: tensors.update(odd=torch.ones(1)), "1 unknown"),
    "shape": (lambda tensors: tensors.update({"inner.weight": torch.ones(4, 6)}), r"\(4, 6\)"),
    "dtype": (lambda tensors: tensors.update({"inner.weight": torch.ones(6, 4).half()}), "float16"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_does_not_fit_is_an_error(change: str) -> None:
    """Oracle: the message names the misfit."""
    made = trained(1, 1)
    tensors, aliases = state.model_tensors(made.model)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    alter, message = CHANGES[change]
    alter(tensors)
    with pytest.raises(TrainingFailed, match=message):
        state.load(made, Held(tensors, state.optimizer_tensors(made)), aliases)


def test_weights_shared_in_another_way_are_an_error() -> None:
    """Oracle: the aliases of both sides are named."""
    made = trained(1, 1)
    tensors, _ = state.model_tensors(made.model)
    with pytest.raises(TrainingFailed, match="shared weights differ"):
        state.load(made, Held(tensors, state.optimizer_tensors(made)), {})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("optimizer.frozen.exp_avg", "does not train"),
        ("optimizer.stranger.exp_avg", "does not train"),
        ("ema.stranger", "1 unknown"),
        ("scaler.scale", "1 unknown"),
    ],
)
def test_a_state_without_an_owner_is_an_error(name: str, message: str) -> None:
    """Oracle: nothing is dropped silently."""
    made = trained(1, 1)
    tensors = {**state.optimizer_tensors(made), name: torch.ones(2)}
    model, aliases = state.model_tensors(made.model)
    with pytest.raises(TrainingFailed, match=message):
        state.load(made, Held(model, tensors), aliases)


def test_the_loss_scaler_comes_back() -> None:
    """Oracle: torch's state dict of the scaler."""
    scaler, other = (torch.amp.GradScaler("cpu", init_scale=scale) for scale in (1024.0, 8.0))
    for one in (scaler, other):
        one.scale(torch.ones(1))  # it makes its state at first use
    made, target = trained(1, 1), trained(1, 1)
    source = TrainingState(made.model, made.optimizer, scaler, made.ema)
    aim = TrainingState(target.model, target.optimizer, other, target.ema)
    restored(source, aim)
    assert other.state_dict() == scaler.state_dict()
