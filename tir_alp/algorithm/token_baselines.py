"""Baselines of least variance, weighted by squared norms of scores.

The baseline of least variance of a policy gradient weights the return of each trajectory by the
squared norm of its score.

*By token* (OTB, 2602.07078). With logits as parameters, the squared norm of the score of one token
is 1 - 2 pi + sum_v pi_v^2, and those of the tokens up to t add up to the energy W_t of the
trajectory:

    A_i,t = R_i - sum_j W_j,t R_j / (sum_j W_j,t + 1e-8)

The sums are over the trajectories of the group that have a token with the number t. Where there is
only one, nothing can be compared, and A = R_i: the returns given are centred.

*By trajectory, of samples from another policy* (OPOB of VCPO, 2602.17616). With w_i the ratio of
the trajectory, current over rollout policy, and g_i the gradient of its logprob in the weights:

    b = sum_j w_j^2 |g_j|^2 R_j / sum_j w_j^2 |g_j|^2
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tir_alp.algorithm.levels import MAX_LOG_RATIO

_EPSILON = 1e-8


def energies(logprobs: Tensor, collisions: Tensor) -> Tensor:
    """Return the energy of a trajectory up to each of its tokens, [n] float64.

    Args:
        logprobs: [n] logprobs of the tokens, in order.
        collisions: [n] sum_v pi_v^2 of the distribution that each token was drawn from.
    """
    return (1 - 2 * logprobs.double().exp() + collisions.double()).cumsum(0)


def token_advantages(
    returns: Sequence[float], energy: Sequence[Tensor], numbers: Sequence[Tensor]
) -> list[Tensor]:
    """Return the advantages [n_i] float64 of the tokens of each trajectory of a group.

    Args:
        returns: [G] return of each trajectory, minus the mean of the group.
        energy: [G] of [n_i] float64, the energies of its tokens.
        numbers: [G] of [n_i] int64, the number t of each token; different within a trajectory.
    """
    size = 1 + max((int(each.max()) for each in numbers if len(each)), default=0)
    weighted, total, count = torch.zeros(3, size, dtype=torch.float64)
    for value, own, places in zip(returns, energy, numbers, strict=True):
        weighted.index_add_(0, places, own * value)
        total.index_add_(0, places, own)
        count.index_add_(0, places, torch.ones_like(own))
    baseline = torch.where(count > 1, weighted / (total + _EPSILON), 0)
    return [value - baseline[places] for value, places in zip(returns, numbers, strict=True)]


def off_policy_baseline(
    returns: Sequence[float], log_ratios: Sequence[float], norms: Sequence[float]
) -> float:
    """Return the baseline b of a group; 0 if no trajectory has a gradient.

    Args:
        returns: [G] return of each trajectory, minus the mean of the group.
        log_ratios: [G] log ratio of each trajectory, current over rollout policy, in nats.
        norms: [G] norm of the gradient of the logprob of each trajectory in the trained weights.
    """
    ratios = np.exp(np.clip(log_ratios, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    weights = np.square(ratios * np.asarray(norms, np.float64))
    total = weights.sum()
    return float(weights @ np.asarray(returns, np.float64) / total) if total else 0.0
