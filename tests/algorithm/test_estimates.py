"""Estimates against values that were computed by hand."""

import itertools

import numpy as np
import pytest

from tir_alp.algorithm.estimates import (
    majority_is_correct,
    over_tasks,
    paired_difference,
    pass_at_k,
)


@pytest.mark.parametrize(
    ("num_samples", "num_correct", "k", "expected"),
    [
        (4, 1, 1, 1 / 4),
        (4, 1, 2, 1 / 2),  # 3 of the 6 pairs contain the one that is right
        (5, 2, 3, 9 / 10),  # 1 of the 10 triples avoids both
        (5, 3, 3, 1.0),
        (7, 0, 7, 0.0),
        (1, 1, 1, 1.0),
    ],
)
def test_pass_at_k_of_small_numbers(num_samples, num_correct, k, expected):
    assert pass_at_k(num_samples, num_correct, k) == pytest.approx(expected, abs=1e-15)


def test_pass_at_k_is_the_share_of_the_subsets_with_a_right_sample():
    for num_samples, num_correct, k in itertools.product(range(1, 7), range(7), range(1, 7)):
        if num_correct > num_samples or k > num_samples:
            continue
        subsets = list(itertools.combinations(range(num_samples), k))
        share = sum(min(each) < num_correct for each in subsets) / len(subsets)
        assert pass_at_k(num_samples, num_correct, k) == pytest.approx(share)


@pytest.mark.parametrize("arguments", [(3, 1, 4), (3, 4, 2), (3, 1, 0), (3, -1, 1)])
def test_impossible_counts_are_refused(arguments):
    with pytest.raises(ValueError, match=f"pass@{arguments[2]}"):
        pass_at_k(*arguments)


@pytest.mark.parametrize(
    ("answers", "correct", "expected"),
    [
        (["4", "4", "5"], [True, True, False], 1.0),
        (["4", "5", "5"], [True, False, False], 0.0),
        (["1/2", "0.5", "2", "2"], [True, True, False, False], 0.5),  # two ways to write one
        (["7", "8", "9"], [False, True, False], 1 / 3),
        ([None, None, "3"], [False, False, True], 1.0),  # no answer, no vote
        ([None, None], [False, False], 0.0),
    ],
)
def test_the_majority_by_hand(answers, correct, expected):
    assert majority_is_correct(answers, correct) == pytest.approx(expected)


def test_the_interval_of_a_mean_agrees_with_the_normal_approximation():
    values = np.random.default_rng(1).binomial(1, 0.3, 400).astype(float)
    found = over_tasks(values.tolist())
    error = 1.96 * values.std() / 20
    assert found.mean == values.mean() and found.num_tasks == 400
    assert found.low == pytest.approx(values.mean() - error, abs=0.006)
    assert found.high == pytest.approx(values.mean() + error, abs=0.006)
    assert over_tasks(values.tolist()) == found  # the same seed


def test_an_interval_of_two_tasks_by_hand():
    # Means of resamples are 0, 1/2 and 1 with probabilities 1/4, 1/2, 1/4.
    found = over_tasks([0.0, 1.0])
    assert (found.mean, found.low, found.high) == (0.5, 0.0, 1.0)
    assert over_tasks([0.25, 0.25]).low == over_tasks([0.25, 0.25]).high == 0.25


def test_pairing_removes_what_the_tasks_have_in_common():
    difficulty = np.random.default_rng(2).random(200)
    found = paired_difference((difficulty + 0.1).tolist(), difficulty.tolist())
    assert (found.low, found.high) == pytest.approx((0.1, 0.1))
    with pytest.raises(ValueError, match="3 tasks cannot be paired with 2"):
        paired_difference([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="no tasks"):
        over_tasks([])
