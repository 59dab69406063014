"""Double execution: what it finds and names, that it finds nothing in sound models, and leaves no trace."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import numpy as np
import planted_models
import pytest
import torch
from planted_models import Blank, Indexing, Restless, Sound, micro_step
from test_ledger import Varied
from torch import Tensor, nn

from harness.determinism.double import Checked, Double
from harness.determinism.sandbox import Sandbox
from harness.determinism.ulp import distance


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Two CPU threads, on which additions race."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def seeded(kind: type[nn.Module]) -> nn.Module:
    """A model with the same weights every time."""
    torch.manual_seed(0)
    return kind()


def looked(double: Double, execute: Callable[[], Tensor], *, fine: bool, own: bool) -> Checked:
    """A double execution; ``own``: the run's own pass is the first of the two."""
    if not own:
        return double.check(execute, fine=fine)
    for each in double._parameters.values():
        each.grad = None
    return double.check(execute, fine=fine, own=double.own(execute, fine=fine))


def first_mismatch(model: nn.Module, *, fine: bool, own: bool = False, tries: int = 60) -> Checked:
    """The first double execution that is not clean; a race may need several."""
    double, execute = Double(model, model, {}), micro_step(model)
    found = (looked(double, execute, fine=fine, own=own) for _ in range(tries))
    return next(each for each in found if not each.clean)


FAULTS = [
    (Indexing, "aten.index_put", "Indexing", "rows (backward)"),
    (Restless, "planted.restless", "Restless", "mixed"),
    (Blank, "aten.empty_like", "Blank", "mixed"),
]


@pytest.mark.parametrize(("fine", "own"), [(True, False), (False, False), (True, True)])
@pytest.mark.parametrize(("kind", "op", "module", "function"), FAULTS)
def test_a_planted_fault_is_named_with_module_and_line(
    two_threads: None, kind: type[nn.Module], op: str, module: str, function: str, fine: bool, own: bool
) -> None:
    """Oracle: the operator that was planted, and the method that calls it."""
    (difference,) = first_mismatch(seeded(kind), fine=fine, own=own).differences
    assert (difference.op, difference.module) == (op, module)
    assert (difference.call_site or "").startswith("planted_models.py:")
    assert (difference.call_site or "").endswith(function)


def test_a_flipped_last_bit_is_one_unit_in_the_last_place() -> None:
    """Oracle: the operator flips bit 0 of one element or of two."""
    (difference,) = first_mismatch(seeded(Restless), fine=True).differences
    assert difference.ulp == 1


def test_a_pass_that_runs_other_operators_is_said_to_do_so() -> None:
    """Oracle: one execution in two adds nothing once more, in place of what all the others run there."""
    passes = iter(range(100))

    class Wavering(Sound):
        def mixed(self, x: Tensor) -> Tensor:
            return super().mixed(x + 0 if next(passes) % 2 else x)

    (difference,) = first_mismatch(seeded(Wavering), fine=True).differences
    assert (difference.module, difference.ulp) == ("Wavering", None)
    assert difference.source == (
        "double execution: aten.empty_like ran in one, aten.add in its place in another"
    )


@pytest.mark.parametrize("kind", [Sound, planted_models.Untagged])
def test_sound_models_come_out_clean(kind: type[nn.Module]) -> None:
    """Oracle: every operator of theirs is deterministic; memory that is left empty is moved, never read."""
    model = seeded(kind)
    double, execute = Double(model, model, {}), micro_step(model)
    for number in range(20):
        checked = looked(double, execute, fine=number % 2 == 0, own=number % 4 < 2)
        assert checked.clean, checked.differences


def test_layers_of_every_kind_come_out_clean_and_their_operators_are_told() -> None:
    """Oracle: a model with attention, convolution, batch statistics, a GRU and dropout, on one thread."""
    torch.manual_seed(5)
    model, tokens = Varied(), torch.randint(0, 32, (4, 12))

    def execute() -> Tensor:
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        loss.backward()
        return loss.detach()

    checked = Double(model, model, {}).check(execute, fine=True)
    assert checked.clean, checked.differences
    assert {"aten.embedding", "aten.native_layer_norm", "aten.bernoulli"} <= checked.operators


class Diary(nn.Module):
    """Changes everything that a pass may change."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.normal = nn.BatchNorm1d(4)
        self.register_buffer("rebound", torch.zeros(1))
        self.loose = torch.zeros(1)
        self.calls, self.notes, self.table = 0, [0], {"inner": [1], "array": np.zeros(2)}
        self.generator = generator

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.notes.append(self.calls)
        self.table["inner"].append(2)
        self.table["array"] += 1
        self.table["new"] = 3
        self.loose += 1
        self.rebound = self.rebound + 1
        self.late = torch.ones(1)
        noise = torch.rand(x.shape, generator=self.generator) + torch.rand(1)
        noise = noise + float(np.random.rand()) + random.random()
        return self.normal(self.linear(x + noise))


def state_of(model: Diary) -> list[object]:
    """Everything of a diary, in values."""
    tensors = [*model.parameters(), *model.buffers(), model.loose, model.table["array"]]
    plain = [model.calls, list(model.notes), list(model.table), list(model.table["inner"])]
    numbers = [torch.rand(1).item(), np.random.rand(), random.random()]
    return [*(each.tolist() for each in tensors), *plain, hasattr(model, "late"), numbers]


def diary() -> tuple[Diary, torch.Generator, Callable[[], Tensor]]:
    """A model, its own generator and a pass of it: twins each time, at the same random numbers."""
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    generator = torch.Generator().manual_seed(3)
    model = Diary(generator)

    def execute() -> Tensor:
        loss = model(torch.ones(6, 4)).pow(3).sum()
        loss.backward()
        return loss.detach()

    return model, generator, execute


def test_nothing_is_left_of_two_executions() -> None:
    """Oracle: a twin that was not executed: values, identities, and the next random numbers."""
    made: list[list[object]] = []
    for looked in (True, False):
        model, generator, execute = diary()
        model.linear.weight.grad = gradient = torch.ones(4, 4)
        held = [model.rebound, model.loose, model.notes, gradient]
        if looked:
            checked = Double(model, model, {"own": generator}).check(execute, fine=True)
            assert checked.clean, (checked.differences, checked.refused)
        now = [model.rebound, model.loose, model.notes, model.linear.weight.grad]
        assert all(one is other for one, other in zip(held, now, strict=True))
        assert torch.equal(gradient, torch.ones(4, 4))
        made.append([*state_of(model), torch.rand(1, generator=generator).item()])
    assert made[0] == made[1]


def test_what_a_pass_has_moved_on_is_named() -> None:
    """Oracle: the attributes that the diary's code changes; batch statistics are written and never read."""
    torch.manual_seed(0)
    model = Diary(torch.Generator().manual_seed(1))
    with Sandbox(model, model, {"own": model.generator}) as sandbox:
        sandbox.rewind()
        assert sandbox.moved() == []
        model(torch.ones(4, 4))
        changed = {"calls", "notes", "table", "loose", "rebound", "late"}
        assert sorted(sandbox.moved()) == sorted(f"Diary.{name}" for name in changed)
        sandbox.rewind()
        assert sandbox.moved() == []


@pytest.mark.parametrize("fine", [True, False])
def test_the_runs_own_pass_goes_on_as_if_it_had_not_been_executed_again(fine: bool) -> None:
    """Oracle: a twin that was executed once: values, gradients, loss, and the next random numbers."""
    made: list[list[object]] = []
    for twice in (True, False):
        model, generator, execute = diary()
        if twice:
            double = Double(model, model, {"own": generator})
            own = double.own(execute, fine=fine)
            now = [model.rebound, model.late, model.linear.weight.grad]
            checked = double.check(execute, fine=fine, own=own)
            assert checked.clean, (checked.differences, checked.refused)
            assert checked.nanoseconds > own.nanoseconds > 0
            held = [model.rebound, model.late, model.linear.weight.grad]
            assert all(one is other for one, other in zip(held, now, strict=True))
            loss = own.loss
        else:
            loss = execute()
        gradients = [each.grad.tolist() for each in model.parameters() if each.grad is not None]
        made.append([loss.item(), gradients, *state_of(model), torch.rand(1, generator=generator).item()])
    assert made[0] == made[1]


def test_what_cannot_be_put_back_is_refused_and_not_executed() -> None:
    """Oracle: a hook that steps an optimizer, an iterator and an unregistered generator."""
    hooked, stream, drawing = seeded(Sound), seeded(Sound), seeded(Sound)
    hooked.table.register_post_accumulate_grad_hook(lambda parameter: None)
    stream.numbers = iter(range(3))
    drawing.own = torch.Generator()
    for model, words in ((hooked, "hook"), (stream, "`Sound.numbers`"), (drawing, "`Sound.own`")):
        executed: list[int] = []
        checked = Double(model, model, {}).check(lambda ran=executed: ran.append(1), fine=False)  # type: ignore[misc]
        assert words in checked.refused[0]
        assert not checked.clean
        assert not executed


def test_an_error_in_the_sandbox_leaves_the_state_and_is_raised() -> None:
    """Oracle: the gradient and the generators from before."""
    model = seeded(Sound)
    model.table.grad = gradient = torch.ones_like(model.table)
    before = torch.get_rng_state()

    def broken() -> Tensor:
        torch.rand(1)
        raise ValueError("as a model may")

    with pytest.raises(ValueError, match="as a model may"):
        Double(model, model, {}).check(broken, fine=True)
    assert model.table.grad is gradient
    assert torch.equal(before, torch.get_rng_state())


def test_distances_are_in_units_of_the_last_place() -> None:
    """Oracle: torch.nextafter, and bits counted by hand around zero."""
    one = torch.tensor([1.0, -2.0, 0.0])
    up = torch.nextafter(one, torch.tensor(9.0))
    assert distance(one, one.clone()) is None
    assert distance(one, up) == 1
    assert distance(torch.tensor([-0.0]), torch.tensor([0.0])) == 0
    tiny = torch.tensor([1], dtype=torch.int32).view(torch.float32)
    assert distance(-tiny, tiny) == 2
    assert (
        distance(torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1.0078125], dtype=torch.bfloat16))
        == 1
    )
    assert distance(torch.tensor([float("nan")]), torch.tensor([1.0])) is None
