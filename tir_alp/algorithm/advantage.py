"""From the rewards of a group to the advantage of each of its trajectories.

Plain floats: a group has a dozen members, and what comes out is read by people too. One invariant
is kept: a group whose rewards are all equal carries no signal, so its advantages are exactly 0,
never the residue of a rounded mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from tir_alp.algorithm.presets import AlgorithmConfig
from tir_alp.config import RolloutConfig
from tir_alp.types import TrajectoryGroup

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


def length_penalty(num_tokens: int, max_tokens: int, buffer_tokens: int) -> float:
    """Return 0 down to -1, linearly over the last `buffer_tokens` before `max_tokens`.

    The soft overlong punishment of DAPO (2503.14476); without a buffer, 0.
    """
    if not buffer_tokens:
        return 0.0
    excess = num_tokens - (max_tokens - buffer_tokens)
    return -min(max(excess / buffer_tokens, 0.0), 1.0)


def group_advantages(
    group: TrajectoryGroup, algorithm: AlgorithmConfig, rollout: RolloutConfig
) -> tuple[float, ...]:
    """The advantage of each trajectory of a group: [G].

    Rewards, with the length penalty if there is one, become advantages; a trajectory that is masked
    or that a limit cut takes part in that, too. Where the run asks for it, those cut then get 0.
    """
    limit, buffer = rollout.max_context_tokens, rollout.overlong_buffer_tokens
    rewards = [
        each.reward + length_penalty(len(each.token_ids), limit, buffer)
        for each in group.trajectories
    ]
    zero_overlong = rollout.overlong == "zero_advantage"
    return tuple(
        0.0 if zero_overlong and trajectory.is_overlong else advantage
        for trajectory, advantage in zip(
            group.trajectories, ADVANTAGES[algorithm.advantage](rewards), strict=True
        )
    )


def has_signal(group: TrajectoryGroup, advantages: Sequence[float]) -> bool:
    """Whether the group can teach anything: a token of the loss has an advantage other than 0."""
    return any(
        advantage != 0 and any(trajectory.loss_mask)
        for trajectory, advantage in zip(group.trajectories, advantages, strict=True)
    )


ADVANTAGES: Mapping[str, Callable[[Sequence[float]], tuple[float, ...]]] = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
}
