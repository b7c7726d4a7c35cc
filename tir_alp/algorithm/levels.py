"""Ratio levels: over which tokens is a log ratio summed or averaged?

`RATIO_LEVELS` holds them; a new one is a function and an entry here, and its name in
`presets.Level`. Importing this module does not import torch, so that the configuration can read the
table quickly: tensors are only touched through their own methods.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from tir_alp.algorithm.inputs import LossInputs

MAX_LOG_RATIO = 20.0
"""Log ratios are clamped to +-20 before `exp`; a token beyond that has no gradient."""


def clamped_exp(log_ratios: Tensor) -> Tensor:
    """Return ratios between e^-20 and e^20."""
    return log_ratios.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


class LevelFunction(Protocol):
    """Maps the log ratio of each token to the log ratio that is used at that token."""

    def __call__(self, log_ratios: Tensor, inputs: LossInputs, /) -> Tensor:
        """Both tensors are [B, T]; `log_ratios` is 0 outside the mask."""
        ...


@dataclass(frozen=True, slots=True)
class RatioLevel:
    """An entry of `RATIO_LEVELS`."""

    function: LevelFunction
    formula: str
    """The definition of log r_t from l_t, the log ratio of one token."""


def _token(log_ratios: Tensor, inputs: LossInputs) -> Tensor:
    return log_ratios


def _sequence(log_ratios: Tensor, inputs: LossInputs) -> Tensor:
    return _straight_through(log_ratios.sum(-1, keepdim=True), log_ratios)


def _sequence_geometric(log_ratios: Tensor, inputs: LossInputs) -> Tensor:
    lengths = inputs.loss_mask.sum(-1, keepdim=True).clamp(min=1)
    return _straight_through(log_ratios.sum(-1, keepdim=True) / lengths, log_ratios)


def _turn(log_ratios: Tensor, inputs: LossInputs) -> Tensor:
    # Every turn has at least one token, so the index of a turn is below T.
    index = inputs.require("turn_ids").where(inputs.loss_mask, 0)
    zeros = log_ratios.new_zeros(log_ratios.shape)
    sums = zeros.scatter_add(-1, index, log_ratios.detach())
    return _straight_through(sums.gather(-1, index), log_ratios)


def _turn_geometric(log_ratios: Tensor, inputs: LossInputs) -> Tensor:
    mask = inputs.loss_mask.to(log_ratios.dtype)
    lengths = _turn(mask, inputs).clamp(min=1)
    return _straight_through(_turn(log_ratios, inputs) / lengths, log_ratios)


def _cumulative(log_ratios: Tensor, inputs: LossInputs) -> Tensor:
    return _straight_through(log_ratios.cumsum(-1), log_ratios)


def _cumulative_geometric(log_ratios: Tensor, inputs: LossInputs) -> Tensor:
    lengths = inputs.loss_mask.cumsum(-1).clamp(min=1)
    return _straight_through(log_ratios.cumsum(-1) / lengths, log_ratios)


def _straight_through(values: Tensor, log_ratios: Tensor) -> Tensor:
    """Equation (4): the value of `values`, the gradient of the token's own log ratio."""
    return values.detach() + (log_ratios - log_ratios.detach())


RATIO_LEVELS: dict[str, RatioLevel] = {
    "token": RatioLevel(_token, "log r_t = l_t"),
    "sequence": RatioLevel(_sequence, "log r_t = sum_s l_s"),
    "sequence_geometric": RatioLevel(_sequence_geometric, "log r_t = mean_s l_s"),
    "turn": RatioLevel(_turn, "log r_t = sum of l_s over the turn of t"),
    "turn_geometric": RatioLevel(_turn_geometric, "log r_t = mean of l_s over the turn of t"),
    "cumulative": RatioLevel(_cumulative, "log r_t = sum_{s<=t} l_s"),
    "cumulative_geometric": RatioLevel(_cumulative_geometric, "log r_t = mean_{s<=t} l_s"),
}
