"""Digests of tensors by weighted sums of their bits."""

from __future__ import annotations

import itertools
from dataclasses import replace

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


def splitmix(number: int) -> int:
    """An odd weight: the finalizer of SplitMix64, as published, in Python's integers."""
    word = number * 0x9E3779B97F4A7C15 & MASK
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & MASK
    word = (word ^ word >> 27) * 0x94D049BB133111EB & MASK
    return (word ^ word >> 31) | 1


def digits(column: int) -> list[int]:
    """Of the weight of a column, lowest first: from -63 to 63, the lowest of them odd."""
    word = splitmix((1 << 61) + column)
    found = [(word >> 7 * place) % 127 - 63 for place in range(1, 9)]
    return [found[0] | 1, *found[1:]]


COLUMNS = [digits(column) for column in range(ROW)]


def by_hand(tensor: torch.Tensor) -> int:
    """The sum of a large tensor in Python's unbounded integers, byte by byte, as the docstring describes."""
    data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    columns = [sum(digit * 128**place for place, digit in enumerate(each)) for each in COLUMNS]
    rows = [splitmix((1 << 62) + row) for row in range(len(data) // ROW + 1)]
    signed = [byte - 256 if byte > 127 else byte for byte in data]
    return sum(byte * rows[at // ROW] * columns[at % ROW] for at, byte in enumerate(signed)) & MASK


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 7, ROW // 2, 2 * ROW, 5 * ROW + 3])
def test_the_sum_of_a_large_tensor_is_what_integers_without_bounds_give(dtype, count):
    """Oracle: Python's integers, reduced once at the end."""
    tensor = values(count, dtype)
    assert [each & MASK for each in Plan({"a": tensor}, large=0).sums().tolist()] == [by_hand(tensor)]


@pytest.mark.parametrize("large", [0, 10**9])
def test_the_sum_is_the_same_on_any_number_of_threads(large):
    """Oracle: one thread, for a tensor of which torch gives each thread a part."""
    plan, found, before = Plan({"a": values(300 * ROW, torch.float32)}, large), [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(plan.digest(plan.sums()))
    finally:
        torch.set_num_threads(before)
    assert len(set(found)) == 1


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


@pytest.mark.parametrize("multiplies", [True, False])
def test_however_a_device_multiplies_bytes_the_sum_is_the_same(monkeypatch, multiplies):
    """Oracle: Python's integers; also for bytes chosen by the sign of a digit, the largest products."""
    monkeypatch.setitem(bit_sums._multiplies, torch.device("cpu"), multiplies)
    extreme = torch.tensor([-128, 127], dtype=torch.int8).repeat(2 * ROW)
    against = torch.tensor([[-128 if each[-1] > 0 else 127 for each in COLUMNS]], dtype=torch.int8)
    for tensor in (values(5 * ROW + 3, torch.float32), extreme, against.repeat(3, 1)):
        assert [each & MASK for each in Plan({"a": tensor}, 0).sums().tolist()] == [by_hand(tensor)]


def test_sums_in_several_groups_and_of_views_are_those_of_each_tensor_alone(monkeypatch):
    """Oracle: a plan of the tensor alone, and of a copy of it; a shard that begins within a row, a transposed
    view, a tensor that is larger than a group, and one that another rank sums."""
    monkeypatch.setattr(bit_sums, "_GROUP_ROWS", 100)
    whole = {
        "larger": Piece(values(150 * ROW // 4 + 9, torch.float32), 150 * ROW // 4 + 9),
        "turned": Piece(values(64 * ROW // 4, torch.float32).view(64, -1).t(), 64 * ROW // 4),
        "shard": Piece(values(60 * ROW // 4, torch.float32), 200 * ROW // 4, 37),
        "of another": Piece(values(5, torch.float32), 5, owned=False),
        "complex": Piece(values(ROW, torch.complex64), ROW),
    }
    for _ in range(2):  # the groups share memory
        together = dict(zip(whole, Plan(whole, 0).sums().tolist(), strict=True))
        alone = {
            name: Plan({name: replace(each, local=each.local.clone().contiguous())}, 0).sums().tolist()
            for name, each in whole.items()
        }
        assert alone == {name: [found] for name, found in together.items()}


@pytest.mark.parametrize("large", [0, 10**9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=str)
def test_changed_signs_are_seen_however_many_there_are(dtype, large):
    """Oracle: the changes. Were words of 64 bits weighed by 64 bits, two highest bits would cancel out."""
    count = 4 * ROW
    tensor = values(count, dtype)
    plan = Plan({"a": tensor}, large)
    parts = torch.view_as_real(tensor) if dtype.is_complex else tensor
    found = {plan.digest(plan.sums())}
    chosen = [
        [1, 3],
        [1, count - 1],
        [0, 2],
        list(range(1, count, 2)),
        list(range(0, count, 2)),
        range(count),
    ]
    for places in chosen:
        other = parts.clone()
        other[list(places)] *= -1
        if dtype.is_complex:
            other = torch.view_as_complex(other)
        found.add(plan.digest(plan.sums([other])))
    if dtype.is_complex:
        found.add(plan.digest(plan.sums([tensor.conj().resolve_conj()])))
    assert len(found) == len(chosen) + 1 + dtype.is_complex


def test_any_two_changed_bytes_of_a_row_change_its_sum():
    """Oracle: a·u + b·v is 0 for u and v only when they are multiples of one vector, by a and -b or so.

    Digits stand for the weights: two sums that differ in a digit differ, since 255 · (u + v) is below 2^64.
    """
    weights = [sum(digit * 128**place for place, digit in enumerate(each)) for each in COLUMNS]
    assert all(each % 2 for each in weights)
    assert 2 * 255 * max(map(abs, weights)) < 1 << 64
    reduced = set()
    for each in weights:
        common = each
        for number in range(2, 256):  # the ratio of two changes has no larger factors
            while common % number == 0:
                common //= number
        reduced.add(abs(common))
    assert len(reduced) == ROW
