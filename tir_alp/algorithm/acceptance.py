"""Acceptance of an update: has the engine kept what the trainer gained?

MIPU (2606.29526): with pi the trainer's and mu the engine's policy after an update, J the expected
reward, and trajectories y_i sampled from mu with the advantages A_i in their groups:

    J(mu) - J(pi)  ~  T = -mean_i( rho_i A_i ),    rho_i = ( pi(y_i) / mu(y_i) )^(1 / length)

An update is accepted if T >= -c, where c falls linearly from `tolerance` to `last_tolerance`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tir_alp.algorithm.levels import MAX_LOG_RATIO

if TYPE_CHECKING:
    from tir_alp.algorithm.presets import AcceptanceConfig


def inference_gap(log_ratios: Sequence[float], advantages: Sequence[float]) -> float:
    """Return T, an estimate of what the engine's policy is better than the trainer's.

    Args:
        log_ratios: [S] mean over the tokens of each trajectory, at least one, of the trainer's
            minus the engine's logprob, in nats.
        advantages: [S] advantage of each trajectory.
    """
    ratios = np.exp(np.clip(log_ratios, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    return float(-np.mean(ratios * np.asarray(advantages, np.float64)))


def tolerance_at(step: int, how: AcceptanceConfig) -> float:
    """Return c, by which the gap may be below 0 for the update of a step, numbered from 0."""
    passed = min(step / how.tolerance_steps, 1.0)
    return how.tolerance + (how.last_tolerance - how.tolerance) * passed
