"""Statistics over seeds, against scipy's own tests, published tables, and the error rate they promise."""

from __future__ import annotations

import math
import random
import statistics as plain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from harness.report import statistics

VALUES = st.lists(st.floats(-1e3, 1e3).map(lambda value: round(value, 3)), min_size=2, max_size=12)


@given(VALUES)
@settings(max_examples=30, deadline=None)
def test_the_interval_of_a_mean_is_that_of_the_one_sample_t_test(values: list[float]) -> None:
    """Oracle: `scipy.stats.ttest_1samp(...).confidence_interval`."""
    found = statistics.mean_interval(values)
    if plain.stdev(values) == 0:
        assert found.low == found.high == pytest.approx(values[0])
        return
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-6, abs=1e-6)


@given(st.lists(st.tuples(st.integers(-999, 999), st.integers(-999, 999)), min_size=2, max_size=12))
@settings(max_examples=30, deadline=None)
def test_arms_with_the_same_seeds_are_compared_in_pairs(pairs: list[tuple[int, int]]) -> None:
    """Oracle: `scipy.stats.ttest_rel`."""
    one = {seed: float(pair[0]) for seed, pair in enumerate(pairs)}
    other = {seed: float(pair[1]) for seed, pair in enumerate(pairs)}
    found = statistics.compare(one, other)
    assert found is not None
    assert found.paired
    if found.deviation == 0:
        assert found.effect is None
        return
    expected = stats.ttest_rel(list(one.values()), list(other.values())).confidence_interval(0.95)
    assert (found.interval.low, found.interval.high) == pytest.approx((expected.low, expected.high), rel=1e-6)


def test_arms_with_other_seeds_are_compared_by_welch() -> None:
    """Oracle: `scipy.stats.ttest_ind` without equal variances."""
    one, other = {0: 1.0, 1: 2.5, 2: 2.0}, {7: 0.5, 8: 0.9, 9: 1.4, 10: 0.2}
    found = statistics.compare(one, other)
    assert found is not None
    assert not found.paired
    test = stats.ttest_ind(list(one.values()), list(other.values()), equal_var=False)
    expected = test.confidence_interval(0.95)
    assert (found.interval.low, found.interval.high) == pytest.approx((expected.low, expected.high))
    assert (found.seeds, found.others) == ((0, 1, 2), (7, 8, 9, 10))


def test_one_seed_gives_no_interval() -> None:
    """Oracle: the t distribution has no zero degrees of freedom."""
    assert statistics.compare({0: 1.0}, {0: 2.0}) is None
    assert statistics.compare({0: 1.0, 1: 2.0}, {5: 2.0}) is None


@pytest.mark.parametrize(
    ("effect", "paired", "expected"), [(0.5, True, 34), (0.5, False, 64), (0.8, False, 26), (0.2, False, 394)]
)
def test_the_number_of_seeds_is_that_of_published_power_tables(
    effect: float, paired: bool, expected: int
) -> None:
    """Oracle: Cohen 1988, table 2.4.1 (two samples), and G*Power 3.1 for the paired test; power 0.8, 5 %."""
    assert statistics.seeds_needed(effect, 1.0, paired=paired) == expected


def test_a_difference_that_is_the_margin_cannot_be_decided_by_more_seeds() -> None:
    """Oracle: the power never leaves half of the error rate."""
    assert statistics.seeds_needed(0.0, 1.0, paired=True) is None


def test_the_bootstrap_is_the_same_each_time_and_needs_values_that_differ() -> None:
    """Oracle: a fixed seed; the range of the values."""
    values = [1.0, 2.0, 4.0, 8.0, 16.0]
    found = statistics.bootstrap_interval(values)
    assert found is not None
    assert found == statistics.bootstrap_interval(values)
    assert min(values) <= found.low < plain.fmean(values) < found.high <= max(values)
    assert statistics.bootstrap_interval([1.0, 1.0, 1.0, 2.0]) is None


def test_equal_arms_differ_as_often_as_the_level_says() -> None:
    """Oracle: the binomial distribution around 5 % for 1,000 comparisons of five against five seeds."""
    draw = random.Random(20261125)
    wrong = 0
    for _ in range(1000):
        one, other = ({seed: draw.gauss(0, 1) for seed in range(5)} for _ in range(2))
        found = statistics.compare(one, other)
        assert found is not None
        wrong += not found.interval.low <= 0 <= found.interval.high
    low, high = stats.binom.interval(0.9999, 1000, 0.05)
    assert low <= wrong <= high
    assert math.isclose(low, 25, abs_tol=3)
