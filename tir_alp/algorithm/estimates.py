"""Estimates from repeated samples of tasks, and their uncertainty. Pure; numpy only.

An evaluation samples each of N tasks k times. Tasks are the independent units: samples of one task
share its difficulty. So all intervals come from resampling tasks, never single answers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_RESAMPLES = 10_000
_CHUNK = 1 << 22  # numbers in memory at a time


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over tasks with its interval."""

    mean: float
    low: float
    """Lower end of the 95 % interval."""
    high: float
    """Upper end of the 95 % interval."""
    num_tasks: int


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Return the unbiased estimate of the probability that one of k samples is correct.

    1 - C(n - c, k) / C(n, k): the share of the subsets of k samples with a correct one (Chen et
    al. 2021, arXiv 2107.03374, equation 1).

    Args:
        num_samples: n, the number of samples of the task.
        num_correct: c, the number of correct ones.
        k: Size of the subsets, at most n.

    Raises:
        ValueError: If k is larger than n, or c is.
    """
    if not 1 <= k <= num_samples or not 0 <= num_correct <= num_samples:
        raise ValueError(f"pass@{k} of {num_correct} correct samples of {num_samples}")
    if num_samples - num_correct < k:
        return 1.0
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def majority_is_correct(answers: Sequence[str | None], correct: Sequence[bool]) -> float:
    """Return the probability that the most frequent answer of a task is right.

    All right answers count as one answer, however they are written; wrong ones are told apart by
    their text. Among equally frequent answers one is drawn, so the value can lie between 0 and 1.
    Samples without an answer do not vote.

    Args:
        answers: The answer of each sample; None if it gave none.
        correct: Whether each is right.
    """
    votes = Counter(
        "" if right else f"wrong: {(answer or '').strip()}"
        for answer, right in zip(answers, correct, strict=True)
        if right or answer is not None
    )
    if not votes:
        return 0.0
    most = max(votes.values())
    first = [answer for answer, count in votes.items() if count == most]
    return 1 / len(first) if "" in first else 0.0


def over_tasks(values: Sequence[float], seed: int = 0) -> Estimate:
    """Return the mean of one value per task, with its percentile bootstrap interval over tasks.

    Args:
        values: [N] one value per task, at least one.
        seed: Seed of the resampling.

    Raises:
        ValueError: If there are no values.
    """
    if not len(values):
        raise ValueError("there are no tasks to average over")
    array = np.asarray(values, np.float64)
    low, high = np.percentile(_resampled_means(array, seed), (2.5, 97.5))
    return Estimate(float(array.mean()), float(low), float(high), len(array))


def paired_difference(values: Sequence[float], others: Sequence[float], seed: int = 0) -> Estimate:
    """Return the mean difference `values - others` of the same tasks, with its interval.

    Args:
        values: [N] one value per task.
        others: [N] the values of the same tasks in the other evaluation.
        seed: Seed of the resampling.

    Raises:
        ValueError: If they are not equally many, or none.
    """
    if len(values) != len(others):
        raise ValueError(f"{len(values)} tasks cannot be paired with {len(others)}")
    return over_tasks(np.subtract(values, others).tolist(), seed)


def _resampled_means(values: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    size = len(values)
    per_chunk = max(1, _CHUNK // size)
    means = [
        values[rng.integers(0, size, (min(per_chunk, _RESAMPLES - start), size))].mean(axis=1)
        for start in range(0, _RESAMPLES, per_chunk)
    ]
    return np.concatenate(means)
