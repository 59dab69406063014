"""Digests of tensors by weighted sums of their bits."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.determinism import bit_sums
from harness.determinism.bit_sums import ROW, Piece, Plan

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.complex64]
MASK = 2**64 - 1


def values(count: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)).mul(50).to(dtype)


def by_hand(tensor: torch.Tensor) -> int:
    """The sum of a large tensor in Python's unbounded integers, word by word, as the docstring describes."""
    data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    data += bytes(-len(data) % 8)
    words = [int.from_bytes(data[at : at + 8], "little") for at in range(0, len(data), 8)]
    row, column = (
        bit_sums._mixed(start, len(words) // ROW + 1 if start == 1 << 62 else ROW).tolist()
        for start in (1 << 62, 1 << 61)
    )
    return sum(word * row[at // ROW] * column[at % ROW] for at, word in enumerate(words)) & MASK


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 7, 2 * ROW, 5 * ROW + 3])
def test_the_sum_of_a_large_tensor_is_what_integers_without_bounds_give(dtype, count):
    """Oracle: Python's integers, reduced once at the end."""
    tensor = values(count, dtype)
    assert [each & MASK for each in Plan({"a": tensor}, large=0).sums().tolist()] == [by_hand(tensor)]


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(DTYPES),
    st.integers(1, 3 * ROW),
    st.lists(st.integers(0, 3 * ROW), max_size=3),
    st.booleans(),
)
def test_however_a_tensor_is_cut_the_digest_is_that_of_the_whole(dtype, count, cuts, large):
    """Oracle: the same tensor in one piece. Cuts fall within words and rows, and shards may be empty."""
    tensors = {"a": values(count, dtype), "b": values(5, torch.float32)}
    limit = 0 if large else 10**9
    plan = Plan(tensors, limit)
    bounds = [0, *sorted(min(cut, count) for cut in cuts), count]
    total = torch.zeros_like(plan.sums())
    for number, (begin, end) in enumerate(itertools.pairwise(bounds)):
        # A view into other memory, as a rank's shard or a bucket of DDP is.
        shard = Piece(tensors["a"][begin:end], count, begin, (count,))
        total += Plan({"a": shard, "b": Piece(tensors["b"], 5, 0, (5,), number == 0)}, limit).sums()
    assert plan.digest(total) == plan.digest(plan.sums())


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 4 * ROW - 1), st.integers(0, 31), st.sampled_from([0, 10**9]))
def test_one_flipped_bit_changes_the_digest(place, bit, large):
    """Oracle: the flip itself."""
    tensor = values(4 * ROW, torch.float32)
    flipped = tensor.clone()
    flipped.view(torch.int32)[place] ^= -(2**31) if bit == 31 else 1 << bit
    plan = Plan({"a": tensor}, large)
    assert plan.digest(plan.sums()) != plan.digest(plan.sums([flipped]))


@pytest.mark.parametrize("large", [0, 10**9])
def test_permutations_signs_of_zero_names_shapes_and_dtypes_count(large):
    """Oracle: what a plain sum, an XOR or a norm would miss."""
    tensor = values(4 * ROW, torch.float32)
    tensor[5] = 0.0
    swapped, negative = tensor.clone(), tensor.clone()
    swapped[[0, 3 * ROW]] = tensor[[3 * ROW, 0]]
    negative[5] = -0.0
    others = [swapped, negative, tensor.view(2, -1), tensor.view(torch.int32), tensor.flip(0)]
    digests = [Plan({"a": each}, large) for each in (tensor, *others)] + [Plan({"b": tensor}, large)]
    assert len({plan.digest(plan.sums()) for plan in digests}) == len(digests)
    pair = {"a": tensor, "b": swapped}
    exchanged = Plan({"a": swapped, "b": tensor}, large)
    assert exchanged.digest(exchanged.sums()) != Plan(pair, large).digest(Plan(pair, large).sums())


def test_where_integer_products_of_matrices_are_missing_the_sum_is_the_same(monkeypatch):
    """Oracle: the way of the CPU; CUDA has no integer mv and dot, so its way is plain arithmetic."""
    tensors = {"a": values(5 * ROW + 3, torch.float32), "b": values(9, torch.float32)}
    expected = Plan(tensors, 100).sums()
    monkeypatch.setattr(bit_sums, "_combined", lambda matrix, weights: (matrix * weights[:, None]).sum(0))
    monkeypatch.setattr(bit_sums, "_dot", lambda left, right: (left * right).sum())
    assert torch.equal(Plan(tensors, 100).sums(), expected)
