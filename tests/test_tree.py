"""The fixed tree: its shape, and that who adds which part does not show."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.determinism import tree
from harness.training import optimizer
from harness.training.elastic import tree_norm
from harness.training.elastic.whole_lanes import WholeLanes


def leaves(count: int, seed: int) -> torch.Tensor:
    """Floats of very different sizes, so that any other order of additions rounds otherwise."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 7, generator=generator) * 10 ** torch.randint(
        -6, 7, (count, 7), generator=generator
    )


def by_definition(values: torch.Tensor) -> torch.Tensor:
    """The tree as it is defined: the sum of the halves' sums."""
    if len(values) == 1:
        return values[0]
    middle = len(values) // 2
    return by_definition(values[:middle]) + by_definition(values[middle:])


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([1, 2, 4, 8, 16, 32]), st.integers(0, 1000), st.data())
def test_every_division_among_ranks_gives_the_bits_of_the_tree(count: int, seed: int, data: st.DataObject):
    """Oracle: the recursive definition; any number of ranks, each with a counter, then the upper levels."""
    values = leaves(count, seed)
    ranks = data.draw(st.sampled_from([2**power for power in range(count.bit_length())]))
    own = count // ranks
    parts = []
    for rank in range(ranks):
        counter = tree.Counter()
        mine = values[rank * own : (rank + 1) * own]
        for leaf in mine[:-1]:
            counter.add([leaf.clone()])
        parts.append(counter.carried(0, mine[-1].clone()))
    assert torch.equal(tree.summed(torch.stack(parts)), by_definition(values))
    assert torch.equal(tree.summed(values), by_definition(values))
    assert torch.equal(tree.folded(values.clone()), by_definition(values))


def test_the_order_shows_in_these_leaves():
    """Oracle: float arithmetic; were every order to give the same bits, the test above would show nothing."""
    values = leaves(16, 0)
    one_by_one = values[0].clone()
    for value in values[1:]:
        one_by_one += value
    assert not torch.equal(one_by_one, tree.summed(values))


@pytest.mark.parametrize("count", [1, 2, 8, 32])
def test_a_counter_holds_no_more_lists_than_it_says(count: int):
    """Oracle: log2 of the leaves and one."""
    counter, most = tree.Counter(), 1
    for leaf in leaves(count, 1)[:-1]:
        counter.add([leaf.clone()])
        most = max(most, 1 + sum(each is not None for each in counter._levels))
    assert most <= tree.held_lists(count) == count.bit_length()


@pytest.mark.parametrize("count", [0, 3, 6])
def test_other_numbers_of_leaves_are_refused(count: int):
    """Oracle: the definition has none for them."""
    with pytest.raises(ValueError, match="no power of two"):
        tree.summed(torch.zeros(count, 2))
    with pytest.raises(ValueError, match="no power of two"):
        tree.folded(torch.zeros(count, 2))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.integers(1, 70), st.integers(0, 1000), st.data())
def test_rows_have_the_same_squares_however_they_are_cut(
    rows: int, width: int, seed: int, data: st.DataObject
):
    """Oracle: the rows of the whole matrix, bit for bit; float64 for their size."""
    whole = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    cut = data.draw(st.integers(0, rows))
    of_whole = tree_norm.row_squares({"weight": whole, "other": whole[0]})["weight"]
    parts = [
        tree_norm.row_squares({"weight": part})["weight"] for part in (whole[:cut], whole[cut:]) if len(part)
    ]
    assert torch.equal(torch.cat(parts), of_whole)
    torch.testing.assert_close(of_whole.double(), whole.double().square().sum(1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("clip", [None, 0.5, 1e9])
def test_the_norm_is_that_of_all_gradients_and_clips_them(clip: float | None):
    """Oracle: torch.nn.utils.clip_grad_norm_ on copies."""
    gradients = {"a": torch.randn(5, 3), "b": torch.randn(7), "c": torch.randn(()), "d": torch.randn(2, 3, 4)}
    copies = [torch.nn.Parameter(each.clone()) for each in gradients.values()]
    for copy, each in zip(copies, gradients.values(), strict=True):
        copy.grad = each.clone()
    expected = torch.nn.utils.clip_grad_norm_(copies, float("inf") if clip is None else clip)
    norm = tree_norm.gradient_norm(gradients)
    torch.testing.assert_close(norm, expected)
    if clip is not None:
        optimizer.scale(list(gradients.values()), optimizer.clip_factor(norm, clip))
    for copy, each in zip(copies, gradients.values(), strict=True):
        torch.testing.assert_close(each, copy.grad)


def updated(kind: type[torch.optim.AdamW], sizes: list[int], ranks: int) -> list[torch.Tensor]:
    """Parameters, both moments and a moving average after 10 updates of which each rank does its part."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(size, generator=generator) for size in sizes]
    gradients = [[torch.randn(size, generator=generator) for size in sizes] for _ in range(10)]
    parts: list[list[torch.Tensor]] = [[] for _ in range(4 * len(sizes))]
    for rank in range(ranks):
        own = [torch.nn.Parameter(torch.tensor_split(value, ranks)[rank].clone()) for value in values]
        averages = [each.detach().clone() for each in own]
        optimizer = kind(own, lr=1e-2, weight_decay=0.1, fused=True)
        for update in gradients:
            for parameter, gradient in zip(own, update, strict=True):
                parameter.grad = torch.tensor_split(gradient, ranks)[rank].clone()
            optimizer.step()
            torch._foreach_lerp_(averages, [each.detach() for each in own], 0.01)
        for at, (parameter, average) in enumerate(zip(own, averages, strict=True)):
            moments = optimizer.state[parameter]
            for kind_of, tensor in enumerate(
                (parameter.detach(), moments["exp_avg"], moments["exp_avg_sq"], average)
            ):
                parts[4 * at + kind_of].append(tensor)
    return [torch.cat(each) for each in parts]


def test_an_update_has_the_same_bits_however_parameters_are_cut():
    """Oracle: the update of whole parameters; torch's own is near, and not the same when cut."""
    sizes = [3, 16, 17, 100, 1003]
    whole = updated(WholeLanes, sizes, 1)
    for ranks in (2, 4, 8):
        assert all(map(torch.equal, updated(WholeLanes, sizes, ranks), whole))
    torch.testing.assert_close(whole, updated(torch.optim.AdamW, sizes, 1))
