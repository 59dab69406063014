"""Statistics over seeds, by scipy: intervals, paired and unpaired comparisons, and how many seeds it takes.

scipy is the only thing in the auditing half that is not always there: `pip install '.[statistics]'`.

- intervals of a mean: Student's t, which assumes roughly normal values, and the bootstrap (bias-corrected and
  accelerated, Efron 1987), which does not but needs more values
- differences: paired by seed where both sides have the same seeds, else Welch's t (1947)
- effect sizes: mean over standard deviation of the paired differences, or Hedges' g (1981)
- seeds needed: from the power of the same t test, by the noncentral t distribution
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.errors import EnvironmentFault

POWER = 0.8
"""Probability with which the seeds needed would find the difference."""
MOST_SEEDS = 100_000
_RESAMPLES = 4999
_BOOTSTRAP_LEAST = 4
"""Values below which resampling says nothing that the values themselves do not."""


@dataclass(frozen=True)
class Interval:
    """A confidence interval."""

    low: float
    high: float
    level: float

    def __str__(self) -> str:
        return f"{self.low:.4g} to {self.high:.4g}"


@dataclass(frozen=True)
class Comparison:
    """Treatment minus baseline, over seeds."""

    difference: float
    """Of the means."""
    interval: Interval
    deviation: float
    """Of the paired differences, or of a value within an arm (pooled), sample standard deviation."""
    effect: float | None
    """Cohen's d of the paired differences, or Hedges' g; None when the values do not vary at all."""
    paired: bool
    seeds: tuple[int, ...]
    """Those compared: the common ones when paired, else those of the treatment."""
    others: tuple[int, ...]
    """The baseline's, when it was not paired; else empty."""


def mean_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Student's t interval of the mean of at least two ``values``."""
    mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    return _around(mean, error, len(values) - 1, level)


def bootstrap_interval(values: Sequence[float], level: float = 0.95) -> Interval | None:
    """BCa bootstrap interval of the mean, from a fixed seed; None for fewer than four different values."""
    if len(set(values)) < _BOOTSTRAP_LEAST:
        return None
    found = (
        _scipy()
        .bootstrap(
            (list(values),),
            # A row of resamples at a time.
            lambda rows, axis: rows.mean(axis=axis),
            confidence_level=level,
            n_resamples=_RESAMPLES,
            rng=0,
            method="BCa",
        )
        .confidence_interval
    )
    return Interval(float(found.low), float(found.high), level)


def compare(
    treatment: Mapping[int, float], baseline: Mapping[int, float], level: float = 0.95
) -> Comparison | None:
    """The difference of two arms, each seed → value; None when there are too few seeds for an interval.

    Paired when both have the same seeds: a seed fixes initial weights and data order, which a pair shares.
    """
    if set(treatment) == set(baseline):
        return _paired(treatment, baseline, level)
    return _welch(treatment, baseline, level)


def _paired(treatment: Mapping[int, float], baseline: Mapping[int, float], level: float) -> Comparison | None:
    seeds = tuple(sorted(treatment))
    if len(seeds) < 2:
        return None
    differences = [treatment[seed] - baseline[seed] for seed in seeds]
    mean, deviation = statistics.fmean(differences), statistics.stdev(differences)
    effect = mean / deviation if deviation else None
    return Comparison(mean, mean_interval(differences, level), deviation, effect, True, seeds, ())


def _welch(treatment: Mapping[int, float], baseline: Mapping[int, float], level: float) -> Comparison | None:
    one, other = list(treatment.values()), list(baseline.values())
    if len(one) < 2 or len(other) < 2:
        return None
    mean = statistics.fmean(one) - statistics.fmean(other)
    shares = [statistics.variance(values) / len(values) for values in (one, other)]
    # Welch and Satterthwaite's degrees of freedom.
    spread = sum(share**2 / (len(values) - 1) for share, values in zip(shares, (one, other), strict=True))
    freedom = sum(shares) ** 2 / spread if spread else float(len(one) + len(other) - 2)
    pooled = math.sqrt(
        (statistics.variance(one) * (len(one) - 1) + statistics.variance(other) * (len(other) - 1))
        / (len(one) + len(other) - 2)
    )
    # Hedges' correction of the bias of d in small samples.
    correction = 1 - 3 / (4 * (len(one) + len(other)) - 9)
    effect = mean / pooled * correction if pooled else None
    interval = _around(mean, math.sqrt(sum(shares)), freedom, level)
    seeds = tuple(sorted(treatment)), tuple(sorted(baseline))
    return Comparison(mean, interval, pooled, effect, False, *seeds)


def seeds_needed(distance: float, deviation: float, *, paired: bool, level: float = 0.95) -> int | None:
    """Seeds in each arm with which a true difference at ``distance`` from the margin would be found with
    probability `POWER`, if values vary by ``deviation``; None when no number up to `MOST_SEEDS` would do.
    """
    if deviation == 0:
        return 2
    effect = abs(distance) / deviation
    if _power(MOST_SEEDS, effect, paired, level) < POWER:
        return None
    low, high = 1, MOST_SEEDS  # the power grows with the number: the answer lies above low, up to high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _power(middle, effect, paired, level) >= POWER else (middle, high)
    return high


def _power(count: int, effect: float, paired: bool, level: float) -> float:
    """Of a two-sided t test with ``count`` seeds in each arm, in the direction of the effect."""
    stats = _scipy()
    freedom = count - 1 if paired else 2 * count - 2
    shift = effect * math.sqrt(count if paired else count / 2)
    bound = float(stats.t.ppf((1 + level) / 2, freedom))
    return float(stats.nct.sf(bound, freedom, shift))


def _around(mean: float, error: float, freedom: float, level: float) -> Interval:
    if error == 0:
        return Interval(mean, mean, level)
    half = float(_scipy().t.ppf((1 + level) / 2, freedom)) * error
    return Interval(mean - half, mean + half, level)


def _scipy() -> Any:
    try:
        from scipy import stats
    except ImportError as error:
        raise EnvironmentFault(
            "statistics over several runs need scipy", remedy="pip install '.[statistics]'"
        ) from error
    return stats
