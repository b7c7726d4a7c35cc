"""Intervals against textbook values, and by simulation."""

import math
import random

import pytest

from tir_alp.report.intervals import (
    Interval,
    difference_of,
    difference_of_shares,
    mean_of,
    quantile_of_t,
    share_of,
)


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.706), (4.9, 2.776), (30, 2.042), (40, 2.021), (1e6, 1.960)]
)
def test_quantiles_are_those_of_the_tables(freedom, quantile):
    assert quantile_of_t(freedom) == pytest.approx(quantile, abs=2e-3)


def test_wilsons_interval_is_that_of_the_literature():
    """The values are those of Newcombe (1998), Statistics in Medicine 17, 857, table I."""
    for correct, tasks, low, high in ((81, 263, 0.2553, 0.3662), (0, 20, 0.0, 0.1611)):
        found = share_of(correct / tasks, tasks)
        assert (found.low, found.high) == pytest.approx((low, high), abs=1e-4)
    assert not share_of(0.5, 0).is_known


def test_newcombes_interval_is_that_of_the_literature():
    """Newcombe (1998), Statistics in Medicine 17, 873, table II: 56/70 - 48/80, method 10."""
    found = difference_of_shares(share_of(56 / 70, 70), share_of(48 / 80, 80))
    assert (found.low, found.high) == pytest.approx((0.0524, 0.3339), abs=1e-4)
    assert found.sign == 1


def test_too_little_data_has_no_interval():
    assert mean_of([2.0]).mean == 2.0 and not mean_of([2.0]).is_known
    assert math.isnan(mean_of([]).mean) and math.isnan(difference_of([], [1.0]).mean)
    assert difference_of([2.0], [1.0, 1.5]).sign == 0
    assert Interval(1.0, math.nan, math.nan).sign == 0


def test_equal_values_differ_surely_or_not_at_all():
    assert difference_of([1.0, 1.0], [0.0, 0.0]).sign == 1
    assert difference_of([0.0, 0.0], [0.0, 0.0]).sign == 0


def test_intervals_hold_what_they_say():
    rng = random.Random(0)
    draws, held, differ = 1500, 0, 0
    for _ in range(draws):
        one, other = ([rng.gauss(1.0, scale) for _ in range(5)] for scale in (1.0, 2.0))
        found = mean_of(one)
        held += found.low <= 1.0 <= found.high
        differ += difference_of(one, other).sign != 0
    assert 0.93 < held / draws < 0.97
    assert 0.02 < differ / draws < 0.07
