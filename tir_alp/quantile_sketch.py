"""Quantiles of log ratios in constant memory, from a histogram whose counts add up.

Bins are narrow around 0 and widen with the size of what they hold, so that the error is relative: a
log ratio between 1e-6 and 20 in size is known to within 1 % of itself, whether it comes from a
policy that has hardly moved or from one that has collapsed. Smaller ones count as 0, larger ones
and NaN as 20 in size: the ratio is clamped there in the loss, too. The counts are integers, so the
order in which histograms are added changes nothing, not even the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tir_alp.loss import MAX_LOG_RATIO

RELATIVE_ERROR = 0.01
"""Bound of the error of a quantile of log ratios, as a share of its size."""
SMALLEST = 1e-6
"""Log ratios up to this size are one bin, whose quantile is 0."""

_GROWTH = (1 + RELATIVE_ERROR) / (1 - RELATIVE_ERROR)
_PER_SIDE = math.ceil(math.log(MAX_LOG_RATIO / SMALLEST) / math.log(_GROWTH))
NUM_BINS = 2 * _PER_SIDE + 1
"""Bins of a histogram: those of negative log ratios, the one of 0, those of positive ones."""


def bins_of(log_ratios: Tensor) -> Tensor:
    """The bin of each log ratio; int64 in [0, NUM_BINS)."""
    values = log_ratios.double().nan_to_num(nan=MAX_LOG_RATIO)
    size = values.abs().clamp(SMALLEST, MAX_LOG_RATIO)
    steps = ((size / SMALLEST).log() / math.log(_GROWTH)).ceil().clamp(max=_PER_SIDE)
    return _PER_SIDE + (values.sign() * steps).long()


def quantiles(histogram: Tensor, probabilities: Sequence[float]) -> list[float]:
    """The log ratio that a share `p` of all is not above, for each p: numpy's `inverted_cdf`.

    Args:
        histogram: [NUM_BINS] counts, at least one of them above 0.
        probabilities: Between 0 and 1.

    Returns:
        For each, the middle of the bin that the quantile is in: off by at most 1 % of it.
    """
    cumulative = histogram.cumsum(0)
    ranks = [max(1, math.ceil(p * int(cumulative[-1]))) for p in probabilities]
    found = torch.searchsorted(cumulative, torch.tensor(ranks)) - _PER_SIDE
    return [_middle(index) for index in found.tolist()]


def _middle(index: int) -> float:
    """The value whose distance to both ends of the bin is the same share of them."""
    if index == 0:
        return 0.0
    size = SMALLEST * _GROWTH ** abs(index) * 2 / (1 + _GROWTH)
    return math.copysign(size, index)
