"""Advantages: how much better is a trajectory than the others of its group?

`ADVANTAGES` holds the rules, whose functions are in `advantage_rules`. A new one is a function and
an entry here; one that stands in a module of your own is used as `advantage = "my_module:NAME"`.
Importing this module does not import torch, so that the configuration can read the table quickly.

Rewards and advantages are plain floats: a group has a dozen members, and people read the values
too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from tir_alp.algorithm import advantage_rules as rules
from tir_alp.algorithm.lookup import find
from tir_alp.algorithm.section import Section

if TYPE_CHECKING:
    from tir_alp.algorithm.presets import AlgorithmConfig
    from tir_alp.types import Trajectory, TrajectoryGroup


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

    function: Callable[..., tuple[float, ...]]
    """Maps the rewards of one group [G] to advantages [G]."""
    formula: str
    """The advantage in terms of the rewards of the group."""
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Presets that the entry brings: name -> the settings that differ from those of `grpo`."""
    reads: tuple[Literal["lengths", "components"], ...] = ()
    """What the function takes besides, as keyword arguments: numbers of tokens that the policy
    wrote, and components of the reward."""
    is_whitened: bool = False
    """Whether advantages are then brought to mean 0 and variance 1 over the tokens of the step."""
    by_turn: float | None = None
    """Discount per turn with which an advantage of each turn is added to that of its trajectory;
    None: all turns of a trajectory have the same advantage."""
    token_baseline: Literal["none", "position", "written"] = "none"
    """The baseline of each token that the trainer subtracts instead of the group's: none; or of
    tokens with the same number, where all tokens after the prompt count or only those that the
    policy wrote."""
    has_gradient_baseline: bool = False
    """Whether the trainer subtracts the mean over the group, weighted by the squares of ratio and
    gradient norm of each trajectory. Each needs a forward and a backward pass of its own."""


ADVANTAGES: dict[str, Advantage] = {
    "grpo": Advantage(rules.grpo, "(reward - mean) / (std + 1e-6) of the group"),
    "dr_grpo": Advantage(
        rules.dr_grpo,
        "reward - mean of the group",
        {"dr_grpo": {"advantage": "dr_grpo", "aggregation": "sequence_mean_token_sum"}},
    ),
    "rloo": Advantage(
        rules.rloo, "reward - mean of the others of the group", {"rloo": {"advantage": "rloo"}}
    ),
    "reinforce_pp": Advantage(
        rules.plain,
        "reward, at mean 0 and variance 1 over the tokens of the step",
        {"reinforce_pp": {"advantage": "reinforce_pp"}},
        is_whitened=True,
    ),
    "reinforce_pp_baseline": Advantage(
        rules.dr_grpo,
        "reward - mean of the group, at mean 0 and variance 1 over the tokens of the step",
        {"reinforce_pp_baseline": {"advantage": "reinforce_pp_baseline"}},
        is_whitened=True,
    ),
    "opo": Advantage(
        rules.opo,
        "reward - mean of the group weighted by length",
        {"opo": {"advantage": "opo"}},
        reads=("lengths",),
    ),
    "max_rl": Advantage(
        rules.max_rl, "(reward - mean) / mean of the group", {"max_rl": {"advantage": "max_rl"}}
    ),
    "best_of_group": Advantage(
        rules.best_of_group,
        "(reward - second best) / (std + 1e-6) of the group for the best, else 0",
        {"pass_at_k": {"advantage": "best_of_group"}},
    ),
    "gdpo": Advantage(
        rules.gdpo,
        "sum of (component - mean) / (std + 1e-6) of the group, at mean 0 and variance 1 over the "
        "tokens of the step",
        {"gdpo": {"advantage": "gdpo"}},
        reads=("components",),
        is_whitened=True,
    ),
    "gigpo": Advantage(
        rules.grpo,
        "(reward - mean) / (std + 1e-6) of the group, + that of the turn's discounted return among "
        "turns with the same observation",
        {"gigpo": {"advantage": "gigpo"}},
        by_turn=0.95,
    ),
    "otb": Advantage(
        rules.dr_grpo,
        "reward - sum_i W_i,t reward_i / sum_i W_i,t, W_t = sum_{s<=t} (1 - 2 pi + sum_v pi_v^2), "
        "t the position after the prompt",
        {"otb": {"advantage": "otb"}},
        token_baseline="position",
    ),
    "tir_otb": Advantage(
        rules.dr_grpo,
        "reward - sum_i W_i,t reward_i / sum_i W_i,t, W_t = sum_{s<=t} (1 - 2 pi + sum_v pi_v^2), "
        "t the number of the token that the policy wrote",
        {"tir_otb": {"advantage": "tir_otb"}},
        token_baseline="written",
    ),
    "opob": Advantage(
        rules.grpo,
        "(reward - sum_i w_i^2 |g_i|^2 reward_i / sum_i w_i^2 |g_i|^2) / (std + 1e-6) of the "
        "group, w the ratio to pi_rollout and g the gradient of log pi of a whole trajectory",
        {
            "vcpo": {
                "advantage": "opob",
                "surrogate": "cispo",
                "denominator": "rollout",
                "ratio_level": "sequence",
                "clip_low": 1.0,
                "clip_high": 7.0,
                "dual_clip": None,
                "aggregation": "sequence_mean_token_mean",
                "step_scale": "ess",
            }
        },
        has_gradient_baseline=True,
    ),
}


def group_advantages(
    group: TrajectoryGroup, algorithm: AlgorithmConfig, rollout: OverlongConfig
) -> tuple[float, ...]:
    """Return the advantage of each trajectory of a group, before any whitening: [G].

    Advantages are computed from the rewards, minus the length penalty if there is one. Trajectories
    that are masked or cut by a limit take part. Afterwards, with `zero_advantage`, those that a
    limit cut get 0.
    """
    entry = find(algorithm.advantage, ADVANTAGES, Advantage)
    limit, buffer = rollout.max_context_tokens, rollout.overlong_buffer_tokens
    rewards = [
        each.reward + length_penalty(_longest(each), limit, buffer) for each in group.trajectories
    ]
    read = {name: _READERS[name](group.trajectories) for name in entry.reads}
    return _without_overlong(group, entry.function(rewards, **read), rollout)


def step_advantages(
    groups: Sequence[TrajectoryGroup], algorithm: AlgorithmConfig, rollout: OverlongConfig
) -> list[tuple[float, ...]]:
    """Return the advantages of the trajectories of all groups of a step, by group."""
    found = [group_advantages(group, algorithm, rollout) for group in groups]
    if not find(algorithm.advantage, ADVANTAGES, Advantage).is_whitened:
        return found
    lengths = [
        [sum(sum(one.loss_mask) for one in each.sequences) for each in group.trajectories]
        for group in groups
    ]
    scaled = rules.whitened(found, lengths)
    return [_without_overlong(*pair, rollout) for pair in zip(groups, scaled, strict=True)]


def turn_advantages(
    group: TrajectoryGroup, algorithm: AlgorithmConfig
) -> list[tuple[float, ...]] | None:
    """Return by trajectory what is added to its advantage in each turn; None: nothing.

    The turns are those of the conversation, in all its traces. The state in which a turn began is
    what the environment showed last: the prompt, or the observation before it.
    """
    discount = find(algorithm.advantage, ADVANTAGES, Advantage).by_turn
    if discount is None:
        return None
    rewards = [[turn.reward for turn in each.conversation_turns] for each in group.trajectories]
    shown = [
        [state for trace in each.conversation for state in _states(trace)]
        for each in group.trajectories
    ]
    return rules.turn_advantages(rewards, shown, discount=discount)


def _states(trace: Trajectory) -> list[tuple[int, ...]]:
    """The tokens that were shown last before each turn of a trace."""
    return [
        trace.prompt.token_ids,
        *(turn.observation.token_ids for turn in trace.turns[:-1]),
    ]


def _longest(trajectory: Trajectory) -> int:
    """The number of tokens of the longest trace of a conversation: the limit is that of a trace."""
    return max(len(each.token_ids) for each in trajectory.conversation)


def _lengths(trajectories: Sequence[Trajectory]) -> list[int]:
    return [sum(len(turn.completion) for turn in each.conversation_turns) for each in trajectories]


def _components(trajectories: Sequence[Trajectory]) -> dict[str, list[float]]:
    """Name -> the sum over the turns of a component of the reward, 0 where it is missing."""
    totals: list[dict[str, float]] = []
    for trajectory in trajectories:
        own: dict[str, float] = {}
        for turn in trajectory.conversation_turns:
            for name, value in turn.info.get("rewards", {}).items():
                own[name] = own.get(name, 0.0) + value
        totals.append(own)
    names = dict.fromkeys(name for own in totals for name in own)
    return {name: [own.get(name, 0.0) for own in totals] for name in names}


_READERS: dict[str, Callable[[Sequence[Trajectory]], Any]] = {
    "lengths": _lengths,
    "components": _components,
}


def _without_overlong(
    group: TrajectoryGroup, advantages: Sequence[float], rollout: OverlongConfig
) -> tuple[float, ...]:
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
        advantage != 0 and any(any(each.loss_mask) for each in trajectory.sequences)
        for trajectory, advantage in zip(group.trajectories, advantages, strict=True)
    )
