"""From the rewards of a group to the advantage of each of its trajectories.

Plain floats: a group has a dozen members, and what comes out is read by people too. One invariant
is kept: a group whose rewards are all equal carries no signal, so its advantages are exactly 0,
never the residue of a rounded mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

EPSILON = 1e-6
"""Added to the standard deviation of a group."""


def grpo(rewards: Sequence[float]) -> tuple[float, ...]:
    """A_i = (r_i - mean) / (std + 1e-6), with std over G - 1 (GRPO).

    A group of one has nothing to be compared with: mean 0 and std 1 stand in for its own.

    Args:
        rewards: [G] of the trajectories of one group.

    Returns:
        [G] advantages.
    """
    if len(rewards) == 1:
        return (rewards[0] / (1 + EPSILON),)
    centred = dr_grpo(rewards)
    std = math.sqrt(math.fsum(a * a for a in centred) / (len(centred) - 1)) if centred else 0.0
    return tuple(a / (std + EPSILON) for a in centred)


def dr_grpo(rewards: Sequence[float]) -> tuple[float, ...]:
    """A_i = r_i - mean (Dr. GRPO): hard and easy tasks are not blown up by a small deviation.

    In a group of one, mean 0 stands in, so A = r.

    Args:
        rewards: [G] of the trajectories of one group.

    Returns:
        [G] advantages.
    """
    if len(rewards) == 1:
        return (float(rewards[0]),)
    if len(set(rewards)) == 1:
        return (0.0,) * len(rewards)
    mean = math.fsum(rewards) / len(rewards) if rewards else 0.0
    return tuple(reward - mean for reward in rewards)


ADVANTAGES: Mapping[str, Callable[[Sequence[float]], tuple[float, ...]]] = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
}
