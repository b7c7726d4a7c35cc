"""From rewards to advantages: pure functions of plain floats, one group at a time.

A group whose rewards are all equal carries no signal, so its advantages are exactly 0, never the
rounding error of a mean.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence

EPSILON = 1e-6
"""Added to the standard deviation of a group."""


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
    if _are_equal(rewards):
        return (0.0,) * len(rewards)
    mean = math.fsum(rewards) / len(rewards) if rewards else 0.0
    return tuple(reward - mean for reward in rewards)


def rloo(rewards: Sequence[float]) -> tuple[float, ...]:
    """A_i = r_i - mean of the others' rewards (RLOO); in a group of one, A = r."""
    if len(rewards) < 2:
        return dr_grpo(rewards)
    factor = len(rewards) / (len(rewards) - 1)
    return tuple(factor * a for a in dr_grpo(rewards))


def max_rl(rewards: Sequence[float]) -> tuple[float, ...]:
    """A_i = (r_i - mean) / mean (MaxRL): the rarer a right answer, the larger its advantage.

    Where the mean is not positive, and in a group of one, advantages are those of `dr_grpo`: the
    method is meant for rewards that are not negative.
    """
    mean = math.fsum(rewards) / len(rewards) if rewards else 0.0
    if len(rewards) == 1 or mean <= 0:
        return dr_grpo(rewards)
    return tuple(a / mean for a in dr_grpo(rewards))


def best_of_group(rewards: Sequence[float]) -> tuple[float, ...]:
    """The best trajectory has (best - second best) / (std + 1e-6), the others 0 (pass@k).

    Between equally good best trajectories the difference is 0, so none has an advantage.
    """
    if len(rewards) < 2 or _are_equal(rewards):
        return grpo(rewards)
    second, best = sorted(rewards)[-2:]
    mean = math.fsum(rewards) / len(rewards)
    std = math.sqrt(math.fsum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
    lead = (best - second) / (std + EPSILON)
    return tuple(lead if reward == best else 0.0 for reward in rewards)


def opo(rewards: Sequence[float], *, lengths: Sequence[int]) -> tuple[float, ...]:
    """A_i = r_i - sum(length r) / sum(length) (OPO): nearly the baseline of least variance.

    Args:
        rewards: [G] rewards of the trajectories of one group.
        lengths: [G] numbers of tokens that the policy wrote.
    """
    if len(rewards) < 2 or _are_equal(rewards) or not sum(lengths):
        return dr_grpo(rewards)
    weighted = (length * reward for length, reward in zip(lengths, rewards, strict=True))
    baseline = math.fsum(weighted) / sum(lengths)
    return tuple(reward - baseline for reward in rewards)


def gdpo(
    rewards: Sequence[float], *, components: Mapping[str, Sequence[float]]
) -> tuple[float, ...]:
    """Sum over reward components of their own `grpo` advantages (GDPO).

    So a component with a small deviation counts as much as one with a large deviation.

    Args:
        rewards: [G] rewards; they count as the only component if there are no components.
        components: Name -> [G] values of that component of the reward.
    """
    parts = [grpo(values) for values in components.values()] or [grpo(rewards)]
    return tuple(math.fsum(values) for values in zip(*parts, strict=True))


def plain(rewards: Sequence[float]) -> tuple[float, ...]:
    """A_i = r_i."""
    return tuple(map(float, rewards))


def whitened(
    advantages: Sequence[Sequence[float]], lengths: Sequence[Sequence[int]]
) -> list[tuple[float, ...]]:
    """Subtract the mean over all loss tokens of a step, and divide by their deviation.

    The variance divides by N - 1 and has 1e-8 added. If all tokens have the same advantage, all
    become 0.

    Args:
        advantages: By group, [G] advantages.
        lengths: By group, [G] numbers of loss tokens.
    """
    pairs = [
        pair
        for group in zip(advantages, lengths, strict=True)
        for pair in zip(*group, strict=True)
        if pair[1]
    ]
    number = sum(length for _, length in pairs)
    if number < 2 or _are_equal([value for value, _ in pairs]):
        return [(0.0,) * len(group) for group in advantages]
    mean = math.fsum(value * length for value, length in pairs) / number
    squares = math.fsum(length * (value - mean) ** 2 for value, length in pairs)
    scale = 1 / math.sqrt(squares / (number - 1) + 1e-8)
    return [tuple((value - mean) * scale for value in group) for group in advantages]


def turn_advantages(
    rewards: Sequence[Sequence[float]],
    states: Sequence[Sequence[Hashable]],
    *,
    discount: float,
) -> list[tuple[float, ...]]:
    """Compare turns of one group that began in the same state (GiGPO).

    With the return R_t = sum_k discount^(k - t) r_k of a turn, its advantage is the `grpo`
    advantage of R_t among all turns of the group whose state is the same. A state that occurs once
    gives 0.

    Args:
        rewards: By trajectory, the reward of each turn.
        states: By trajectory, what each turn answered to.
        discount: Factor per turn.

    Returns:
        By trajectory, one advantage per turn.
    """
    returns = [_returns(each, discount) for each in rewards]
    members: dict[Hashable, list[tuple[int, int]]] = {}
    for row, turns in enumerate(states):
        for turn, state in enumerate(turns):
            members.setdefault(state, []).append((row, turn))
    found = [[0.0] * len(each) for each in rewards]
    for places in members.values():
        if len(places) > 1:
            values = grpo([returns[row][turn] for row, turn in places])
            for (row, turn), value in zip(places, values, strict=True):
                found[row][turn] = value
    return [tuple(each) for each in found]


def _returns(rewards: Sequence[float], discount: float) -> list[float]:
    returns: list[float] = []
    for reward in reversed(rewards):
        returns.append(reward + discount * (returns[-1] if returns else 0.0))
    return returns[::-1]


def _are_equal(values: Sequence[float]) -> bool:
    return len(set(values)) == 1
