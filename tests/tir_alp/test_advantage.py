import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tir_alp.advantage import ADVANTAGES, dr_grpo, grpo
from tir_alp.config import ALGORITHMS

REWARDS = st.lists(st.floats(-1e3, 1e3, allow_nan=False), min_size=2, max_size=16)


def test_golden_group():
    expected = 0.8660239038
    assert grpo([1, 0, 0, 1]) == pytest.approx([expected, -expected, -expected, expected], rel=1e-9)
    assert dr_grpo([1, 0, 0, 1]) == (0.5, -0.5, -0.5, 0.5)


@given(REWARDS)
@settings(deadline=None)
def test_equal_numpy_with_ddof_1(rewards):
    r = np.array(rewards)
    assert dr_grpo(rewards) == pytest.approx(r - r.mean(), abs=1e-9)
    if r.std(ddof=1) > 1e-9:
        expected = (r - r.mean()) / (r.std(ddof=1) + 1e-6)
        assert grpo(rewards) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@given(REWARDS)
@settings(deadline=None)
def test_sum_to_zero(rewards):
    assert math.fsum(dr_grpo(rewards)) == pytest.approx(0, abs=1e-9)
    assert math.fsum(grpo(rewards)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.parametrize("reward", [0.1, 1 / 3, 1e8 + 0.1, 0.0, -2.7])
def test_an_all_equal_group_is_exactly_zero(name, reward):
    for size in range(2, 20):
        assert ADVANTAGES[name]([reward] * size) == (0.0,) * size


def test_a_group_of_one_keeps_its_reward():
    assert grpo([0.7]) == (0.7 / (1 + 1e-6),)
    assert dr_grpo([0.7]) == (0.7,)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_an_empty_group_has_no_advantages(name):
    assert ADVANTAGES[name]([]) == ()


def test_every_preset_names_an_advantage():
    assert {algorithm.advantage for algorithm in ALGORITHMS.values()} <= set(ADVANTAGES)
