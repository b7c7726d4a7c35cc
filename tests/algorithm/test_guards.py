"""Bounds on a run: what exceeds them, and the messages."""

import math

import pytest

from tir_alp.algorithm.guards import GuardsConfig, faint_noise, out_of_bounds
from tir_alp.training.gradient_norms import is_spike

HEALTHY = {"kl/rollout": 0.01, "ratio/p2": 0.5, "ratio/p98": 2.0}


def test_without_bounds_nothing_is_out_of_them():
    assert out_of_bounds({"kl/rollout": math.nan, "ratio/p98": 1e9}, GuardsConfig()) == ""


@pytest.mark.parametrize("kl", [0.3, -0.3, math.nan, math.inf])
def test_a_kl_beyond_its_bound_is_told_with_both_figures(kl):
    guards = GuardsConfig(max_kl=0.2)
    assert out_of_bounds(HEALTHY, guards) == ""
    said = out_of_bounds(HEALTHY | {"kl/rollout": kl}, guards)
    assert said == f"|kl/rollout| is {abs(kl):.4g}, above guards.max_kl = 0.2"


@pytest.mark.parametrize("p98", [2.1, math.nan])
def test_ratios_too_far_apart_are_told(p98):
    guards = GuardsConfig(max_ratio_spread=4.0)
    assert out_of_bounds(HEALTHY, guards) == ""  # a value on the bound is within it
    said = out_of_bounds(HEALTHY | {"ratio/p98": p98}, guards)
    assert "from 0.5 (P2) to" in said and "max_ratio_spread = 4" in said


def test_a_step_without_an_update_passes_no_bound():
    assert out_of_bounds({}, GuardsConfig(max_kl=0.1, max_ratio_spread=2.0)) == ""


def test_a_spike_is_a_norm_far_above_the_median_of_those_before():
    recent = [1.0] * 7 + [50.0]
    assert is_spike(10.1, recent, 10.0)
    assert not is_spike(9.9, recent, 10.0)
    assert not is_spike(1e9, recent, None)
    assert not is_spike(1e9, recent[:7], 10.0)  # too few norms


def test_noise_that_rounding_swallows_is_told():
    assert faint_noise({}) == faint_noise({"alp/effective": 0.8}) == ""
    assert "changes 0.02% of the elements" in faint_noise({"alp/effective": 0.0002})
