"""Means of a few values with 95 % intervals, for the sentences and tables of a report. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, variance

_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
"""97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom."""
_Z = 1.959964


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with the ends of its 95 % interval, which are NaN if there is none."""

    mean: float
    low: float
    high: float

    @property
    def is_known(self) -> bool:
        """Whether there is an interval."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    @property
    def sign(self) -> int:
        """1 or -1 if all of the interval is above or below 0, else 0."""
        if not self.is_known:
            return 0
        return int(self.low > 0) - int(self.high < 0)


def quantile_of_t(freedom: float) -> float:
    """Return the 97.5 % quantile of Student's t.

    Args:
        freedom: Degrees of freedom, at least 1; a fraction is rounded down, which widens intervals.
    """
    whole = int(freedom)
    return _T[whole - 1] if whole <= len(_T) else _Z + 2.4 / whole


def mean_of(values: Sequence[float]) -> Interval:
    """Return the mean of independent values with Student's interval.

    One value has no interval; no value has no mean either.
    """
    if len(values) < 2:
        return Interval(values[0] if values else math.nan, math.nan, math.nan)
    middle = fmean(values)
    half = quantile_of_t(len(values) - 1) * math.sqrt(variance(values) / len(values))
    return Interval(middle, middle - half, middle + half)


def difference_of(values: Sequence[float], others: Sequence[float]) -> Interval:
    """Return the difference `mean(values) - mean(others)` with Welch's interval."""
    if not values or not others:
        return Interval(math.nan, math.nan, math.nan)
    middle = fmean(values) - fmean(others)
    if min(len(values), len(others)) < 2:
        return Interval(middle, math.nan, math.nan)
    parts = [variance(each) / len(each) for each in (values, others)]
    total = sum(parts)
    if total == 0:
        return Interval(middle, middle, middle)
    freedoms = (
        part**2 / (len(each) - 1) for part, each in zip(parts, (values, others), strict=True)
    )
    half = quantile_of_t(max(1.0, total**2 / sum(freedoms))) * math.sqrt(total)
    return Interval(middle, middle - half, middle + half)


def share_of(share: float, num_tasks: int) -> Interval:
    """Return a share of tasks with Wilson's interval.

    Args:
        share: The mean over tasks of a number from 0 to 1.
        num_tasks: Number of tasks. Each counts once, however often it was sampled, so the interval
            is too wide rather than too narrow if there were several samples.
    """
    if num_tasks < 1 or not 0 <= share <= 1:
        return Interval(share, math.nan, math.nan)
    square = _Z**2 / num_tasks
    middle = (share + square / 2) / (1 + square)
    half = _Z * math.sqrt(share * (1 - share) / num_tasks + square / (4 * num_tasks)) / (1 + square)
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half))


def difference_of_shares(one: Interval, other: Interval) -> Interval:
    """Return the difference `one - other` of two shares, with Newcombe's interval."""
    middle = one.mean - other.mean
    if not (one.is_known and other.is_known):
        return Interval(middle, math.nan, math.nan)
    low = math.hypot(one.mean - one.low, other.high - other.mean)
    high = math.hypot(one.high - one.mean, other.mean - other.low)
    return Interval(middle, middle - low, middle + high)
