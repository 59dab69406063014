"""The order of samples: a permutation each epoch, reached anywhere at the same cost."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.data.order import Order

POWERS = [2**power + offset for power in (2, 3, 6, 10, 13) for offset in (-1, 0, 1)]


@pytest.mark.parametrize("samples", [1, 2, 3, 5, *POWERS, 10**6 + 3])
def test_every_epoch_is_a_permutation(samples: int) -> None:
    """Oracle: the sorted indices of an epoch are all indices, once each."""
    order = Order(samples, seed=11)
    for epoch in (0, 1, 5):
        epochs, indices = order.places(epoch * samples, samples)
        assert (epochs == epoch).all()
        assert (np.bincount(indices, minlength=samples) == 1).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 700), st.integers(0, 2**70), st.integers(0, 40))
def test_any_size_and_seed_is_a_permutation(samples: int, seed: int, epoch: int) -> None:
    """Oracle: as above, over random sizes, seeds (also beyond 64 bits) and epochs."""
    _, indices = Order(samples, seed).places(epoch * samples, samples)
    assert sorted(indices.tolist()) == list(range(samples))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(0, 10**12), st.integers(1, 200))
def test_places_do_not_depend_on_where_reading_started(samples: int, start: int, count: int) -> None:
    """Oracle: each position asked for alone."""
    order = Order(samples, seed=3)
    epochs, indices = order.places(start, count)
    alone = [order.places(start + offset, 1) for offset in range(count)]
    assert epochs.tolist() == [int(epoch[0]) for epoch, _ in alone]
    assert indices.tolist() == [int(index[0]) for _, index in alone]


def test_the_order_is_the_published_one() -> None:
    """Oracle: places written down once; a change here breaks the resume of every run that exists."""
    epochs, indices = Order(samples=10, seed=7).places(5, 10)
    assert epochs.tolist() == [0] * 5 + [1] * 5
    assert indices.tolist() == [7, 4, 3, 1, 2, 6, 3, 2, 7, 8]


@pytest.mark.parametrize("samples", [1, 2, 10, 65, 1000])
def test_places_are_those_of_the_network_in_plain_integers(samples: int) -> None:
    """Oracle: the network written again with Python's integers, one position at a time."""
    _, indices = Order(samples, seed=99).places(7 * samples - 3, 40)
    positions = range(7 * samples - 3, 7 * samples + 37)
    assert indices.tolist() == [_plain(samples, 99, *divmod(position, samples)) for position in positions]


def _plain(samples: int, seed: int, epoch: int, place: int) -> int:
    left_size = math.isqrt(samples - 1) + 1
    right_size = -(-samples // left_size)
    seed_key = int.from_bytes(hashlib.sha256(f"harness order/1\0{seed}".encode()).digest()[:8], "little")
    key = _plain_mix(seed_key + epoch * 0x9E3779B97F4A7C15)
    while True:
        left, right = divmod(place, right_size)
        for number in range(8):
            size = right_size if number % 2 else left_size
            left, right = right, (left + _plain_mix(right ^ _plain_mix(key + number))) % size
        place = left * right_size + right
        if place < samples:
            return place


def _plain_mix(word: int) -> int:
    word %= 2**64
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
    return word ^ word >> 31


def test_epochs_and_seeds_differ() -> None:
    """Oracle: two permutations of 1,000 agree in about one place by chance; ten would be a fault."""
    base = Order(1000, seed=0).places(0, 1000)[1]
    for other in (Order(1000, seed=0).places(1000, 1000)[1], Order(1000, seed=1).places(0, 1000)[1]):
        assert (base == other).sum() < 10


def test_neighbours_are_not_correlated() -> None:
    """Oracle: the serial correlation of a random permutation of n is within 5 / sqrt(n) of 0."""
    indices = Order(100_000, seed=5).places(0, 100_000)[1]
    for lag in (1, 2, 7, 316, 317):
        correlation = np.corrcoef(indices[:-lag], indices[lag:])[0, 1]
        assert abs(correlation) < 5 / np.sqrt(100_000)


def test_first_places_are_uniform_over_seeds() -> None:
    """Oracle: chi-square over 16 cells of 4,000 seeds; its 0.9999 quantile at 15 degrees is 44.3."""
    firsts = [int(Order(16, seed).places(0, 1)[1][0]) for seed in range(4000)]
    counts = np.bincount(firsts, minlength=16)
    assert ((counts - 250) ** 2 / 250).sum() < 44.3


def executed(call: Callable[[], Any]) -> tuple[int, Any]:
    """How many lines of Python ``call`` takes, and what it returns."""
    lines = 0

    def count(frame: Any, event: str, _: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        result = call()
    finally:
        sys.settrace(before)
    return lines, result


def test_seeking_far_costs_no_more_than_seeking_near() -> None:
    """Oracle: the lines of Python that are executed, for position 10**15 in a corpus of 10**12 samples and
    for its beginning; a permutation that walks takes a few more rounds at some places."""
    order = Order(10**12, seed=1)
    near, _ = executed(lambda: order.places(0, 8))
    far, (epochs, indices) = executed(lambda: order.places(10**15, 8))
    assert far < 10 * near
    assert (epochs == 1000).all()
    assert (indices < 10**12).all()


def test_an_order_of_nothing_is_refused() -> None:
    """Oracle: the documented error."""
    with pytest.raises(ValueError, match="at least one sample"):
        Order(0, seed=0)
