"""Quantiles from a histogram against numpy's, over all sizes of log ratios."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tir_alp.algorithm.ratio_summary import NUM_BINS, RELATIVE_ERROR, SMALLEST, bins_of, quantiles

PROBABILITIES = [0.0, 0.02, 0.25, 0.5, 0.75, 0.98, 1.0]
sizes = st.floats(SMALLEST, 20.0)
log_ratios = st.one_of(sizes, sizes.map(lambda x: -x), st.floats(-SMALLEST, SMALLEST))


def histogram(values: list[float] | np.ndarray) -> torch.Tensor:
    return torch.bincount(bins_of(torch.tensor(values, dtype=torch.float64)), minlength=NUM_BINS)


@given(st.lists(log_ratios, min_size=1, max_size=60))
@settings(deadline=None, max_examples=300)
def test_quantiles_are_numpys_within_the_bound(values):
    expected = np.quantile(values, PROBABILITIES, method="inverted_cdf")
    for found, true in zip(quantiles(histogram(values), PROBABILITIES), expected, strict=True):
        assert abs(found - true) <= max(RELATIVE_ERROR * abs(true) * (1 + 1e-9), SMALLEST)


@pytest.mark.parametrize("scale", [1e-5, 1e-3, 0.1, 5.0])
def test_a_hundred_thousand_tokens_at_any_scale(scale):
    values = np.random.default_rng(0).normal(0, scale, 100_000).clip(-20, 20)
    found = quantiles(histogram(values), [0.02, 0.98])
    expected = np.quantile(values, [0.02, 0.98], method="inverted_cdf")
    assert found == pytest.approx(expected, rel=RELATIVE_ERROR)


def test_what_is_beyond_all_bounds_has_a_bin_too():
    values = [math.nan, math.inf, -math.inf, 1e9, -1e9, 0.0]
    bins = bins_of(torch.tensor(values)).tolist()
    assert bins == [NUM_BINS - 1, NUM_BINS - 1, 0, NUM_BINS - 1, 0, NUM_BINS // 2]
    low, high = quantiles(histogram(values), [0.0, 1.0])
    assert (low, high) == pytest.approx((-20, 20), rel=2 * RELATIVE_ERROR)


def test_bins_are_in_the_order_of_what_they_hold():
    values = torch.cat([-torch.logspace(1.3, -7, 5000), torch.logspace(-7, 1.3, 5000)])
    assert (bins_of(values).diff() >= 0).all()


def test_the_same_log_ratio_has_the_same_bin_in_float32():
    values = torch.tensor([0.1, -0.3, 1e-4], dtype=torch.float32)
    assert torch.equal(bins_of(values), bins_of(values.double()))
