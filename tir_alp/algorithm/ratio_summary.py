"""What is kept of the ratios of a step: sums and counts that add up over micro-batches and ranks.

The tokens of a step are sorted into cells: by turn, by sign of the advantage, and by whether they
are among the first after an observation. Of each cell only sums and a histogram are kept, so memory
does not grow with the number of tokens, and any statistic of any slice of the cells can be computed
afterwards: exactly where it is made of sums, within 1 % of a log ratio where it is a quantile.
Turns and sequences keep one number each; their statistics are exact.

Sequences must be whole. Then it makes no difference how they are packed, ordered and divided over
micro-batches and ranks, except for the rounding of float64 sums.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tir_alp.algorithm.inputs import LossInputs
from tir_alp.algorithm.levels import MAX_LOG_RATIO, clamped_exp
from tir_alp.algorithm.surrogates import clip_sides

MAX_TURNS = 8
"""Number of turns with cells of their own; the last one's also hold all later turns."""
FIRST_TOKENS = 16
"""Number of tokens at the start of a turn that count as the first after an observation."""
SIGNS = ("negative", "zero", "positive")
"""Signs of the advantage, in the order of the cells."""
RELATIVE_ERROR = 0.01
"""Bound on the error of a quantile of log ratios, relative to its size."""
SMALLEST = 1e-6
"""Log ratios up to this size share one bin, whose quantile is 0."""

_GROWTH = (1 + RELATIVE_ERROR) / (1 - RELATIVE_ERROR)
_PER_SIDE = math.ceil(math.log(MAX_LOG_RATIO / SMALLEST) / math.log(_GROWTH))
NUM_BINS = 2 * _PER_SIDE + 1
"""Bins of a histogram: for negative log ratios, for 0, for positive log ratios."""

_CELLS = (MAX_TURNS, len(SIGNS), 2)  # the last axis: whether among the first after an observation
_NUM_CELLS = math.prod(_CELLS)


@dataclass(frozen=True, slots=True)
class TokenSlice:
    """Sums and counts over the tokens of some cells."""

    sums: Mapping[str, float]
    """Column -> sum over the tokens; the columns are those of `RatioSummary.columns`."""
    histogram: Tensor
    """[NUM_BINS] int64, counts of log ratios."""

    @property
    def num_tokens(self) -> int:
        """Number of tokens in the cells."""
        return int(self.sums["count"])

    def mean(self, column: str) -> float:
        """Return the mean of a column over the tokens; there must be at least one token."""
        return self.sums[column] / self.sums["count"]

    def clipped(self) -> dict[str, float]:
        """Return the share of the tokens that is clipped on each side, as `clip_<side>`."""
        return {name: self.mean(name) for name in self.sums if name.startswith("clip_")}


@dataclass(frozen=True, slots=True)
class RatioSummary:
    """Ratios of a policy over the rollout policy, on the loss tokens of some sequences."""

    columns: tuple[str, ...]
    """What is summed over tokens. With l the log ratio and r = exp(clamp(l, +-20)): `count`,
    `log_ratio` l, `k3` = r - l - 1, `ratio` r, `ratio_squared` r^2, `logprob`, `rollout_logprob`,
    `entropy`, and `clip_<side>` for each side, which is 1 where the token is clipped."""
    sums: Tensor
    """[MAX_TURNS, SIGNS, 2, columns] float64."""
    histogram: Tensor
    """[MAX_TURNS, SIGNS, 2, NUM_BINS] int64, counts of token log ratios; 650 kB."""
    turn_log_ratios: Tensor
    """[U] float64, summed over each turn that has loss tokens."""
    sequence_log_ratios: Tensor
    """[S] float64, summed over each sequence that has loss tokens."""
    sequence_logprobs: Tensor
    """[S, 2] float64, mean logprob of a sequence's loss tokens under either policy."""

    def __add__(self, other: RatioSummary) -> RatioSummary:
        assert self.columns == other.columns, "summaries of different surrogates"
        return RatioSummary(
            self.columns,
            self.sums + other.sums,
            self.histogram + other.histogram,
            torch.cat([self.turn_log_ratios, other.turn_log_ratios]),
            torch.cat([self.sequence_log_ratios, other.sequence_log_ratios]),
            torch.cat([self.sequence_logprobs, other.sequence_logprobs]),
        )

    def tokens(
        self, *, turn: int | None = None, sign: str | None = None, is_first: bool | None = None
    ) -> TokenSlice:
        """Return the tokens of one turn, of one sign, among the first or not; or all tokens.

        Args:
            turn: Index of the turn, below MAX_TURNS; None: any turn.
            sign: Sign of the advantage, one of SIGNS; None: any sign.
            is_first: Whether the token is among the first after an observation; None: either.
        """
        chosen = (turn, None if sign is None else SIGNS.index(sign), is_first)
        where = tuple(
            slice(None) if each is None else slice(int(each), int(each) + 1) for each in chosen
        )
        sums = self.sums[where].sum((0, 1, 2)).tolist()
        return TokenSlice(
            dict(zip(self.columns, sums, strict=True)), self.histogram[where].sum((0, 1, 2))
        )


@torch.no_grad()
def summarise(
    inputs: LossInputs,
    entropy: Tensor | None = None,
    clipped: Mapping[str, Tensor] | None = None,
) -> RatioSummary:
    """Summarise the ratio `logprobs / rollout_logprobs` of one micro-batch, on the CPU.

    Args:
        inputs: The micro-batch, with `turn_ids`. Proximal and reference logprobs are not read.
        entropy: [B, T] entropy of the policy in the numerator, in nats; None: counts as 0.
        clipped: Side -> [B, T] bool, as in `LossTerms.clipped`; None: no token was clipped.
    """
    mask, turn_ids = inputs.loss_mask, inputs.turn_ids
    if turn_ids is None:
        raise ValueError("a summary is by turn, but LossInputs.turn_ids is None")
    logprobs, rollout = (
        values[mask].double() for values in (inputs.logprobs, inputs.rollout_logprobs)
    )
    log_ratios = logprobs - rollout
    ratios = clamped_exp(log_ratios)
    zeros = torch.zeros_like(ratios)
    clipped = clipped or {}
    columns = {
        "count": torch.ones_like(ratios),
        "log_ratio": log_ratios,
        "k3": ratios - log_ratios - 1,
        "ratio": ratios,
        "ratio_squared": ratios.square(),
        "logprob": logprobs,
        "rollout_logprob": rollout,
        "entropy": zeros if entropy is None else entropy[mask].double(),
        **{
            f"clip_{side}": clipped[side][mask].double() if side in clipped else zeros
            for side in dict.fromkeys([*clip_sides(), *clipped])
        },
    }
    cells = _cells(inputs.advantages, turn_ids)[mask]
    sums = zeros.new_zeros(_NUM_CELLS, len(columns))
    sums = sums.index_add_(0, cells, torch.stack([*columns.values()], -1))
    bins = cells * NUM_BINS + bins_of(log_ratios)
    histogram = torch.bincount(bins, minlength=_NUM_CELLS * NUM_BINS)

    rows, _ = mask.nonzero(as_tuple=True)
    sequences, index = rows.unique(return_inverse=True)
    per_sequence = zeros.new_zeros(len(sequences), 3).index_add_(
        0, index, torch.stack([logprobs, rollout, torch.ones_like(ratios)], -1)
    )
    # Every turn has a token in its row, so its index is below the width of the row.
    turns, index = (rows * mask.shape[1] + turn_ids[mask]).unique(return_inverse=True)
    per_turn = zeros.new_zeros(len(turns)).index_add_(0, index, log_ratios)
    return RatioSummary(
        columns=tuple(columns),
        sums=sums.view(*_CELLS, len(columns)).cpu(),
        histogram=histogram.view(*_CELLS, NUM_BINS).cpu(),
        turn_log_ratios=per_turn.cpu(),
        sequence_log_ratios=(per_sequence[:, 0] - per_sequence[:, 1]).cpu(),
        sequence_logprobs=(per_sequence[:, :2] / per_sequence[:, 2:]).cpu(),
    )


def _cells(advantages: Tensor, turn_ids: Tensor) -> Tensor:
    """Return the index of the cell of each token, [B, T]; meaningless outside the mask."""
    advantages = advantages if advantages.dim() == 2 else advantages[:, None]
    signs = 1 + (advantages > 0).long() - (advantages < 0).long()
    turns = turn_ids.clamp(0, MAX_TURNS - 1)
    is_first = (turn_ids > 0) & (_position_in_turn(turn_ids) < FIRST_TOKENS)
    return (turns * len(SIGNS) + signs) * 2 + is_first.long()


def _position_in_turn(turn_ids: Tensor) -> Tensor:
    """Return the position of each token in its turn, from 0, [B, T]; masked tokens count too."""
    positions = torch.arange(turn_ids.shape[1], device=turn_ids.device).expand_as(turn_ids)
    begins = torch.ones_like(turn_ids, dtype=torch.bool)
    begins[:, 1:] = turn_ids[:, 1:] != turn_ids[:, :-1]
    return positions - torch.where(begins, positions, 0).cummax(-1).values


# --------------------------------------------------------- histograms of log ratios, and quantiles


def bins_of(log_ratios: Tensor) -> Tensor:
    """Return the bin of each log ratio; int64 in [0, NUM_BINS)."""
    values = log_ratios.double().nan_to_num(nan=MAX_LOG_RATIO)
    size = values.abs().clamp(SMALLEST, MAX_LOG_RATIO)
    steps = ((size / SMALLEST).log() / math.log(_GROWTH)).ceil().clamp(max=_PER_SIDE)
    return _PER_SIDE + (values.sign() * steps).long()


def quantiles(histogram: Tensor, probabilities: Sequence[float]) -> list[float]:
    """Return quantiles of log ratios, as numpy's method `inverted_cdf` defines them.

    Args:
        histogram: [NUM_BINS] counts, at least one of which is above 0.
        probabilities: Numbers between 0 and 1.

    Returns:
        For each probability, the middle of the bin of its quantile, which is off by at most 1 %.
    """
    cumulative = histogram.cumsum(0)
    ranks = [max(1, math.ceil(p * int(cumulative[-1]))) for p in probabilities]
    found = torch.searchsorted(cumulative, torch.tensor(ranks)) - _PER_SIDE
    return [_middle(index) for index in found.tolist()]


def _middle(index: int) -> float:
    """Return the value that has the same relative distance from both ends of a bin."""
    if index == 0:
        return 0.0
    size = SMALLEST * _GROWTH ** abs(index) * 2 / (1 + _GROWTH)
    return math.copysign(size, index)
