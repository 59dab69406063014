"""The fixed tree: its shape, and that who adds which part does not show."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.determinism import tree


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


def test_the_order_shows_in_these_leaves():
    """Oracle: float arithmetic; were every order to give the same bits, the test above would show nothing."""
    values = leaves(16, 0)
    one_by_one = values[0].clone()
    for value in values[1:]:
        one_by_one += value
    assert not torch.equal(one_by_one, tree.summed(values))


@pytest.mark.parametrize("count", [1, 2, 8, 32])
def test_a_counter_holds_no_more_lists_than_it_says(count: int):
    """Oracle: the issue's bound, log2 of the leaves and one."""
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
