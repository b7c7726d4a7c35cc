"""AdamW over the shards of the weights, and over log sigma with a learning rate of its own.

In float16 the loss is multiplied by a scale before the backward pass, and the gradients are divided
by it, so that small ones do not vanish. A gradient that overflows halves the scale; after a number
of updates without one it is doubled.

Its state is allocated in the constructor and not in the first update, so that a run without memory
for it fails at its start, and so that a checkpoint of step 0 is like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from tir_alp.config import TrainerConfig
from tir_alp.training.schedule import lr_factor
from tir_alp.training.sharding import whole

POLICY = "grad_norm/policy"
"""Name of the gradient norm of the weights."""

_GROWTH_INTERVAL = 100  # updates without an overflow after which the loss scale is doubled
_LOSS_SCALE = "loss_scale"


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
        self._bounded = {POLICY: [*weights.values()]}
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
        # What the scaler looks at: it takes no optimizer with sharded and whole tensors together.
        self._scaled = [torch.optim.SGD(each, lr=0.0) for each in self._bounded.values()]
        device = next(iter(weights.values())).device.type
        is_float16 = config.dtype == "float16"
        self._scaler = torch.amp.GradScaler(
            device, enabled=is_float16, growth_interval=_GROWTH_INTERVAL
        )
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
        self._scaler.update()

    def skip(self, is_loss_finite: bool) -> bool:
        """Drop the gradients of an update that is not made.

        Args:
            is_loss_finite: Whether the loss of the update was a finite number.

        Returns:
            Whether only the loss scale, which is now halved, was too large.
        """
        self.zero_grad()
        before = self._scaler.get_scale()
        self._scaler.update()
        return is_loss_finite and before > 1 and self._scaler.get_scale() < before

    @property
    def loss_scale(self) -> float | None:
        """What the loss is multiplied by before the backward pass; None: it is not."""
        return self._scaler.get_scale() if self._scaler.is_enabled() else None

    def scaled(self, loss: Tensor) -> Tensor:
        """Return what the backward pass of a loss begins with."""
        return self._scaler.scale(loss)

    def clip_gradients(self) -> dict[str, float]:
        """Undo the loss scale, and bound the norms of the weights and of log sigma; return both."""
        for each in self._scaled:
            self._scaler.unscale_(each)
        return {name: _clip(each, self._bound) for name, each in self._bounded.items()}

    def norm(self) -> float:
        """Return the gradient norm of the weights over all ranks, without the loss scale."""
        return _norm(self._bounded[POLICY]).item() / self._scaler.get_scale()

    def state(self) -> dict[str, Tensor]:
        """Return moments and counts of updates as `parameter.moment`, shared with the optimizer.

        In float16, `loss_scale` has the scale and the number of updates since it changed. It is not
        shared: `finish_loading` takes it.
        """
        state = {
            f"{name}.{key}": value
            for name, parameter in self._named.items()
            for key, value in self._adamw.state[parameter].items()
        }
        if self._scaler.is_enabled():
            saved = self._scaler.state_dict()
            state[_LOSS_SCALE] = torch.tensor(
                [saved["scale"], saved["_growth_tracker"]], dtype=torch.float64
            )
        return state

    def finish_loading(self, state: Mapping[str, Tensor]) -> None:
        """Take what is not shared from a state whose tensors were read in place."""
        if self._scaler.is_enabled():
            scale, num_updates = state[_LOSS_SCALE].tolist()
            saved = {"scale": scale, "_growth_tracker": int(num_updates)}
            self._scaler.load_state_dict(self._scaler.state_dict() | saved)


def _clip(parameters: Sequence[nn.Parameter], bound: float) -> float:
    """Scale gradients so that their norm over all ranks is within the bound; return the norm."""
    norm = _norm(parameters)
    torch.nn.utils.clip_grads_with_norm_(parameters, bound, norm)
    return norm.item()


def _norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    gradients = [each.grad for each in parameters if each.grad is not None]
    return whole(torch.nn.utils.get_total_norm(gradients))
