"""Aggregations: how do the losses of tokens become one number?

`AGGREGATIONS` holds them; a new one is a function and an entry here, and its name in
`presets.AlgorithmConfig`. Importing this module does not import torch, so that the configuration
can read the table quickly: tensors are only touched through their own methods.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class AggregationFunction(Protocol):
    """Sums token losses, each with its weight in the mean."""

    def __call__(
        self,
        losses: Tensor,
        mask: Tensor,
        num_tokens: Tensor,
        num_sequences: Tensor,
        weights: Tensor | None,
        /,
    ) -> Tensor:
        """Return a scalar.

        Args:
            losses: [B, T] token losses, 0 outside the mask.
            mask: [B, T] bool; True for the tokens that count in the mean.
            num_tokens: Number of such tokens in the whole optimizer step, a scalar.
            num_sequences: Number of sequences with such tokens in the whole step, a scalar: the sum
                of their weights.
            weights: [B] weights of the sequences; None: all are 1. Those of the traces of an
                episode may be their shares of its tokens.
        """
        ...


@dataclass(frozen=True, slots=True)
class Aggregation:
    """An entry of `AGGREGATIONS`."""

    function: AggregationFunction
    formula: str
    """The mean in words; "of L_t" follows."""


def _token_mean(
    losses: Tensor,
    mask: Tensor,
    num_tokens: Tensor,
    num_sequences: Tensor,
    weights: Tensor | None,
) -> Tensor:
    """Give every token the same weight."""
    return losses.sum() / num_tokens


def _sequence_mean_token_mean(
    losses: Tensor,
    mask: Tensor,
    num_tokens: Tensor,
    num_sequences: Tensor,
    weights: Tensor | None,
) -> Tensor:
    """Give every sequence the same weight, and within it every token."""
    means = losses.sum(-1) / mask.sum(-1).clamp(min=1)
    return (means if weights is None else means * weights).sum() / num_sequences


def _sequence_mean_token_sum(
    losses: Tensor,
    mask: Tensor,
    num_tokens: Tensor,
    num_sequences: Tensor,
    weights: Tensor | None,
) -> Tensor:
    """Give a sequence a weight in proportion to its length."""
    return losses.sum() / num_sequences


AGGREGATIONS: dict[str, Aggregation] = {
    "token_mean": Aggregation(_token_mean, "mean over tokens"),
    "sequence_mean_token_mean": Aggregation(
        _sequence_mean_token_mean, "mean over sequences of the mean over tokens"
    ),
    "sequence_mean_token_sum": Aggregation(
        _sequence_mean_token_sum, "mean over sequences of the sum over tokens"
    ),
}
