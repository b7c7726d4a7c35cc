"""A baseline of each token, from the energies of the scores of a group (OTB, 2602.07078).

The baseline of least variance of a policy gradient weights the return of each trajectory by the
squared norm of its score. With logits as parameters, the squared norm of the score of one token is
1 - 2 pi + sum_v pi_v^2, and those of the tokens up to t add up to the energy W_t of the trajectory:

    A_i,t = R_i - sum_j W_j,t R_j / (sum_j W_j,t + 1e-8)

The sums are over the trajectories of the group that have a token with the number t. Where there is
only one, nothing can be compared, and A = R_i: the returns given are centred.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

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
