"""Advantages: how much better is a trajectory than the others of its group?

`ADVANTAGES` holds the rules. A new one is a function and an entry here; one that stands in a module
of your own is used as `advantage = "my_module:NAME"`. Importing this module does not import torch,
so that the configuration can read the table quickly.

Rewards and advantages are plain floats: a group has a dozen members, and people read the values
too. A group whose rewards are all equal carries no signal, so its advantages are exactly 0, never
the rounding error of a mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from tir_alp.algorithm.lookup import find
from tir_alp.algorithm.section import Section

if TYPE_CHECKING:
    from tir_alp.algorithm.presets import AlgorithmConfig
    from tir_alp.types import TrajectoryGroup

EPSILON = 1e-6
"""Added to the standard deviation of a group."""


class OverlongConfig(Section):
    """What happens to trajectories that are too long. `RolloutConfig` has these settings."""

    max_context_tokens: int = Field(default=16384, ge=2)
    """Limit of a whole trajectory, in tokens; a trajectory that reaches it is truncated."""
    overlong: Literal["keep", "mask_turn", "mask_trajectory", "zero_advantage"] = "keep"
    """What a limit takes out of the loss: the completion that it cut, or the whole trajectory that
    it cut or ended. With `zero_advantage` these tokens still count in the loss's denominator."""
    overlong_buffer_tokens: int = Field(default=0, ge=0)
    """Over the last so many tokens before `max_context_tokens`, the reward from which advantages
    are computed falls by up to 1; 0 switches this off."""


@dataclass(frozen=True, slots=True)
class Advantage:
    """An entry of `ADVANTAGES`."""

    function: Callable[[Sequence[float]], tuple[float, ...]]
    """Maps the rewards of one group [G] to advantages [G]."""
    formula: str
    """The advantage in terms of the rewards of the group."""
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Presets that the entry brings: name -> the settings that differ from those of `grpo`."""


def grpo(rewards: Sequence[float]) -> tuple[float, ...]:
    """A_i = (r_i - mean) / (std + 1e-6), where std divides by G - 1 (GRPO).

    In a group of one there is nothing to compare with: mean 0 and std 1 are used instead.

    Args:
        rewards: [G] rewards of the trajectories of one group.

    Returns:
        [G] advantages.
    """
    if len(rewards) == 1:
        return (rewards[0] / (1 + EPSILON),)
    centred = dr_grpo(rewards)
    std = math.sqrt(math.fsum(a * a for a in centred) / (len(centred) - 1)) if centred else 0.0
    return tuple(a / (std + EPSILON) for a in centred)


def dr_grpo(rewards: Sequence[float]) -> tuple[float, ...]:
    """A_i = r_i - mean (Dr. GRPO): a small deviation does not blow up hard and easy tasks.

    In a group of one, the mean counts as 0, so A = r.

    Args:
        rewards: [G] rewards of the trajectories of one group.

    Returns:
        [G] advantages.
    """
    if len(rewards) == 1:
        return (float(rewards[0]),)
    if len(set(rewards)) == 1:
        return (0.0,) * len(rewards)
    mean = math.fsum(rewards) / len(rewards) if rewards else 0.0
    return tuple(reward - mean for reward in rewards)


ADVANTAGES: dict[str, Advantage] = {
    "grpo": Advantage(grpo, "(reward - mean) / (std + 1e-6) of the group"),
    "dr_grpo": Advantage(
        dr_grpo,
        "reward - mean of the group",
        {"dr_grpo": {"advantage": "dr_grpo", "aggregation": "sequence_mean_token_sum"}},
    ),
}


def group_advantages(
    group: TrajectoryGroup, algorithm: AlgorithmConfig, rollout: OverlongConfig
) -> tuple[float, ...]:
    """Return the advantage of each trajectory of a group: [G].

    Advantages are computed from the rewards, minus the length penalty if there is one. Trajectories
    that are masked or cut by a limit take part. Afterwards, with `zero_advantage`, those that a
    limit cut get 0.
    """
    limit, buffer = rollout.max_context_tokens, rollout.overlong_buffer_tokens
    rewards = [
        each.reward + length_penalty(len(each.token_ids), limit, buffer)
        for each in group.trajectories
    ]
    advantages = find(algorithm.advantage, ADVANTAGES, Advantage).function(rewards)
    zero_overlong = rollout.overlong == "zero_advantage"
    return tuple(
        0.0 if zero_overlong and trajectory.is_overlong else advantage
        for trajectory, advantage in zip(group.trajectories, advantages, strict=True)
    )


def length_penalty(num_tokens: int, max_tokens: int, buffer_tokens: int) -> float:
    """Return 0 down to -1, linearly over the last `buffer_tokens` before `max_tokens`.

    This is the soft overlong punishment of DAPO (2503.14476); without a buffer it is 0.
    """
    if not buffer_tokens:
        return 0.0
    excess = num_tokens - (max_tokens - buffer_tokens)
    return -min(max(excess / buffer_tokens, 0.0), 1.0)


def has_signal(group: TrajectoryGroup, advantages: Sequence[float]) -> bool:
    """Whether the group can teach anything: some loss token has an advantage other than 0."""
    return any(
        advantage != 0 and any(trajectory.loss_mask)
        for trajectory, advantage in zip(group.trajectories, advantages, strict=True)
    )
