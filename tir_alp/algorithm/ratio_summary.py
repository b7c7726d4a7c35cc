"""What is kept of the ratios of a step: sums and counts that micro-batches, updates and ranks add.

The tokens of a step are sorted into cells, by turn, by sign of the advantage, and by whether they
are among the first after an observation. Of each cell only sums and a histogram stay, so that
memory does not grow with the number of tokens, and any statistic of any slice of the cells can be
had afterwards: exactly where it is made of sums, within 1 % of a log ratio where it is a quantile.
Turns and sequences keep one number each; their statistics are exact.

Sequences must come whole: how they are packed, ordered and divided over micro-batches and ranks
makes no difference then, but for the rounding of float64 sums.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tir_alp.algorithm.loss import MAX_LOG_RATIO, LossInputs

MAX_TURNS = 8
"""Turns with cells of their own; the last one's hold those of all later turns too."""
FIRST_TOKENS = 16
"""So many tokens of a turn after an observation are its first."""
SIGNS = ("negative", "zero", "positive")
"""Of the advantage."""
COLUMNS = (
    "count",
    "log_ratio",
    "k3",
    "ratio",
    "ratio_squared",
    "logprob",
    "rollout_logprob",
    "entropy",
    "clip_low",
    "clip_high",
    "clip_dual",
)
"""What is summed over tokens. With l the log ratio and r = exp(clamp(l, +-20)), k3 is r - l - 1."""

_CELLS = (MAX_TURNS, len(SIGNS), 2)  # the last axis: among the first after an observation?
_NUM_CELLS = MAX_TURNS * len(SIGNS) * 2


@dataclass(frozen=True, slots=True)
class TokenSlice:
    """Sums and counts over the tokens of some cells."""

    sums: Mapping[str, float]
    """By column."""
    histogram: Tensor
    """[NUM_BINS] int64: log ratios."""

    @property
    def num_tokens(self) -> int:
        """Tokens in the cells."""
        return int(self.sums["count"])

    def mean(self, column: str) -> float:
        """Mean over the tokens, of which there has to be one."""
        return self.sums[column] / self.sums["count"]


@dataclass(frozen=True, slots=True)
class RatioSummary:
    """Ratios of a policy over the rollout policy, on the loss's tokens of some sequences."""

    sums: Tensor
    """[MAX_TURNS, SIGNS, 2, COLUMNS] float64."""
    histogram: Tensor
    """[MAX_TURNS, SIGNS, 2, NUM_BINS] int64: token log ratios; 650 kB, however many they are."""
    turn_log_ratios: Tensor
    """[U] float64: summed over each turn that has loss tokens."""
    sequence_log_ratios: Tensor
    """[S] float64: summed over each sequence that has loss tokens."""
    sequence_logprobs: Tensor
    """[S, 2] float64: mean logprob of its loss tokens, of the policy and of the rollout policy."""

    def __add__(self, other: RatioSummary) -> RatioSummary:
        return RatioSummary(
            self.sums + other.sums,
            self.histogram + other.histogram,
            torch.cat([self.turn_log_ratios, other.turn_log_ratios]),
            torch.cat([self.sequence_log_ratios, other.sequence_log_ratios]),
            torch.cat([self.sequence_logprobs, other.sequence_logprobs]),
        )

    def tokens(
        self, *, turn: int | None = None, sign: str | None = None, is_first: bool | None = None
    ) -> TokenSlice:
        """The tokens of one turn, of one sign of the advantage, among the first or not; or of all.

        Args:
            turn: Below MAX_TURNS; None: of any.
            sign: One of SIGNS; None: of any.
            is_first: Among the first after an observation? None: whether or not.
        """
        chosen = (turn, None if sign is None else SIGNS.index(sign), is_first)
        where = tuple(
            slice(None) if each is None else slice(int(each), int(each) + 1) for each in chosen
        )
        sums = self.sums[where].sum((0, 1, 2)).tolist()
        return TokenSlice(
            dict(zip(COLUMNS, sums, strict=True)), self.histogram[where].sum((0, 1, 2))
        )


@torch.no_grad()
def summarise(
    inputs: LossInputs,
    entropy: Tensor | None = None,
    clipped: Mapping[str, Tensor] | None = None,
) -> RatioSummary:
    """Summarise the ratio `logprobs / rollout_logprobs` of one micro-batch, on the CPU.

    Args:
        inputs: With `turn_ids`, and advantages [B] or [B, T]. Other policies are not read.
        entropy: [B, T] of the policy above in the ratio; None: left at 0.
        clipped: Side -> [B, T] bool, from `clipped_tokens`; None: nothing was.
    """
    mask, turn_ids = inputs.loss_mask, inputs.turn_ids
    if turn_ids is None:
        raise ValueError("a summary is by turn, but LossInputs.turn_ids is None")
    logprobs, rollout = (
        values[mask].double() for values in (inputs.logprobs, inputs.rollout_logprobs)
    )
    log_ratios = logprobs - rollout
    ratios = log_ratios.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    zeros = torch.zeros_like(ratios)
    columns = [
        torch.ones_like(ratios),
        log_ratios,
        ratios - log_ratios - 1,
        ratios,
        ratios.square(),
        logprobs,
        rollout,
        zeros if entropy is None else entropy[mask].double(),
        *(
            clipped[side][mask].double() if clipped and side in clipped else zeros
            for side in ("low", "high", "dual")
        ),
    ]
    cells = _cells(inputs.advantages, turn_ids)[mask]
    sums = zeros.new_zeros(_NUM_CELLS, len(COLUMNS))
    sums = sums.index_add_(0, cells, torch.stack(columns, -1))
    places = cells * NUM_BINS + bins_of(log_ratios)
    histogram = torch.bincount(places, minlength=_NUM_CELLS * NUM_BINS)

    rows, _ = mask.nonzero(as_tuple=True)
    sequences, index = rows.unique(return_inverse=True)
    per_sequence = zeros.new_zeros(len(sequences), 3).index_add_(
        0, index, torch.stack([logprobs, rollout, torch.ones_like(ratios)], -1)
    )
    # A turn has a token of its row, so its id is below the row's width.
    turns, index = (rows * mask.shape[1] + turn_ids[mask]).unique(return_inverse=True)
    per_turn = zeros.new_zeros(len(turns)).index_add_(0, index, log_ratios)
    return RatioSummary(
        sums=sums.view(*_CELLS, len(COLUMNS)).cpu(),
        histogram=histogram.view(*_CELLS, NUM_BINS).cpu(),
        turn_log_ratios=per_turn.cpu(),
        sequence_log_ratios=(per_sequence[:, 0] - per_sequence[:, 1]).cpu(),
        sequence_logprobs=(per_sequence[:, :2] / per_sequence[:, 2:]).cpu(),
    )


def _cells(advantages: Tensor, turn_ids: Tensor) -> Tensor:
    """[B, T] index of the cell of each token; of meaning where the mask is True."""
    advantages = advantages if advantages.dim() == 2 else advantages[:, None]
    signs = 1 + (advantages > 0).long() - (advantages < 0).long()
    turns = turn_ids.clamp(0, MAX_TURNS - 1)
    is_first = (turn_ids > 0) & (_place_in_turn(turn_ids) < FIRST_TOKENS)
    return (turns * len(SIGNS) + signs) * 2 + is_first.long()


def _place_in_turn(turn_ids: Tensor) -> Tensor:
    """[B, T] number of each token in the run of its turn, from 0; masked tokens count."""
    places = torch.arange(turn_ids.shape[1], device=turn_ids.device).expand_as(turn_ids)
    begins = torch.ones_like(turn_ids, dtype=torch.bool)
    begins[:, 1:] = turn_ids[:, 1:] != turn_ids[:, :-1]
    return places - torch.where(begins, places, 0).cummax(-1).values


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
