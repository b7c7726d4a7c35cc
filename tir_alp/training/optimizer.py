"""AdamW over the shards of the weights, and over log sigma with a learning rate of its own.

Its state is allocated in the constructor and not in the first update, so that a run without memory
for it fails at its start, and so that a checkpoint of step 0 is like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

from tir_alp.config import TrainerConfig
from tir_alp.training.schedule import lr_factor

MOST_NORMS = 64
"""Number of updates whose gradient norms the next one is compared with."""

_LEAST_NORMS = 8  # with fewer norms, no spike can be recognised


class Optimizer:
    """Updates the weights and log sigma.

    Args:
        weights: The trained parameters of the model, by name.
        log_sigma: The parameter of the noise, the same on every rank; None: there is no noise.
        config: Learning rates and their schedule, weight decay and the bound of gradient norms.
        num_steps: Number of steps of the run; None only if the schedule is constant.
    """

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        log_sigma: nn.Parameter | None,
        config: TrainerConfig,
        num_steps: int | None = None,
    ) -> None:
        self._bound = config.max_grad_norm
        self._bounded = {"grad_norm/policy": [*weights.values()]}
        groups: list[dict[str, Any]] = [
            {"params": [*weights.values()], "lr": config.lr, "weight_decay": config.weight_decay}
        ]
        self._factors: list[Callable[[int], float]] = [partial(lr_factor, config, num_steps)]
        self._named = {**weights}
        if log_sigma is not None:
            rate = config.perturbation_lr
            groups.append({"params": [log_sigma], "lr": rate, "weight_decay": 0.0})
            self._factors.append(lambda step: 1.0)
            self._named["log_sigma"] = log_sigma
            self._bounded["grad_norm/log_sigma"] = [log_sigma]
        for group in groups:
            group["initial_lr"] = group["lr"]  # what LambdaLR multiplies
        self._adamw = torch.optim.AdamW(groups, betas=config.betas, fused=True)
        for parameter in self._named.values():
            self._adamw.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    @property
    def norms(self) -> tuple[str, ...]:
        """Names of the norms that `clip_gradients` returns."""
        return tuple(self._bounded)

    def zero_grad(self) -> None:
        """Drop all gradients."""
        self._adamw.zero_grad(set_to_none=True)

    def begin_step(self, step: int) -> float:
        """Set the learning rates of a step, numbered from 0; return that of the weights."""
        # A new scheduler each time: it is then a function of the step, and has no state to save.
        return float(LambdaLR(self._adamw, self._factors, last_epoch=step - 1).get_last_lr()[0])

    def step(self, scale: float = 1.0) -> None:
        """Make the update, with the learning rate of the weights times `scale`."""
        weights = self._adamw.param_groups[0]
        rate = weights["lr"]
        weights["lr"] = rate * scale
        self._adamw.step()
        weights["lr"] = rate

    def clip_gradients(self) -> dict[str, float]:
        """Bound the gradient norms of the weights and of log sigma separately; return both."""
        return {name: _clip(each, self._bound) for name, each in self._bounded.items()}

    def state(self) -> dict[str, Tensor]:
        """Return moments and counts of updates as `parameter.moment`, shared with the optimizer."""
        return {
            f"{name}.{key}": value
            for name, parameter in self._named.items()
            for key, value in self._adamw.state[parameter].items()
        }


def _clip(parameters: Sequence[nn.Parameter], bound: float) -> float:
    """Scale gradients so that their norm over all ranks is within the bound; return the norm."""
    gradients = [each.grad for each in parameters if each.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    torch.nn.utils.clip_grads_with_norm_(parameters, bound, norm)
    return norm.item()


def is_spike(norm: float, recent: Sequence[float], factor: float | None) -> bool:
    """Whether a gradient norm is more than `factor` times the median of recent norms."""
    if factor is None or len(recent) < _LEAST_NORMS:
        return False
    return norm > factor * median(recent)
