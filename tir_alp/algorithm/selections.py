"""Selections: which tokens of a whole update does a method treat differently?

A selection looks at all tokens of an optimizer update at once: the largest entropies, the largest
covariances. So that the result does not depend on how an update is split over micro-batches and
ranks, it is made once, before the update, from what the proximal policy says, which is the policy
at the start of the step. `SELECTIONS` holds them.

Importing this module does not import torch: tensors are only touched through their own methods.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from tir_alp.algorithm.presets import SelectionConfig


@dataclass(frozen=True, slots=True)
class TokenColumns:
    """What a selection reads of the loss tokens of a whole update: [N] each, on the CPU."""

    proximal: Tensor
    """Logprobs under the proximal policy, float64."""
    rollout: Tensor
    """Rollout logprobs, float64."""
    entropy: Tensor
    """Entropy of the proximal policy, in nats, float64."""
    advantages: Tensor
    """float64."""
    order: Tensor
    """A random number of each token, int64; it is a function of run seed, update and token."""


@dataclass(frozen=True, slots=True)
class Selection:
    """An entry of `SELECTIONS`."""

    function: Callable[[TokenColumns, SelectionConfig], Tensor]
    """Returns which tokens are selected, [N] bool."""
    effect: Literal["keep", "drop", "mark"]
    """What happens to selected tokens: only they have a gradient, they have none, or the surrogate
    treats them differently. A token without gradient still counts in the mean."""
    formula: Callable[[SelectionConfig], str]
    """Says which tokens are selected."""
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Presets that the entry brings: name -> the settings that differ from those of `grpo`."""


def _top_entropy(tokens: TokenColumns, how: SelectionConfig) -> Tensor:
    """The share of the tokens with the largest entropy; those equal to the last one are in."""
    number = _number(how.share, len(tokens.entropy))
    least = tokens.entropy.sort(descending=True).values[number - 1]
    return tokens.entropy >= least


def _second_moment(tokens: TokenColumns, how: SelectionConfig) -> Tensor:
    """As many tokens as possible, smallest squares first, so that their mean square is below high.

    At least the token with the smallest square is selected.
    """
    squares = (tokens.proximal - tokens.rollout).square()
    ordered, places = squares.sort()
    counts = ordered.new_ones(len(ordered)).cumsum(0)
    number = max(1, int((ordered.cumsum(0) / counts < how.high).sum()))
    selected = squares.new_zeros(len(squares))
    selected[places[:number]] = 1
    return selected > 0


def _covariances(tokens: TokenColumns) -> Tensor:
    """(A - mean A) (log pi - mean log pi) of each token; means over the tokens of the update."""
    return (tokens.advantages - tokens.advantages.mean()) * (
        tokens.proximal - tokens.proximal.mean()
    )


def _top_covariance(tokens: TokenColumns, how: SelectionConfig) -> Tensor:
    """The share of the tokens with the largest covariance, at least one token."""
    covariances = _covariances(tokens)
    places = covariances.sort(descending=True, stable=True).indices
    return _only(places[: _number(how.share, len(places))], len(places))


def _random_covariance(tokens: TokenColumns, how: SelectionConfig) -> Tensor:
    """A share of all tokens, at least one, drawn from those whose covariance is in a window."""
    covariances = _covariances(tokens)
    inside = ((covariances > how.low) & (covariances < how.high)).nonzero().flatten()
    chosen = inside[tokens.order[inside].sort().indices[: _number(how.share, len(covariances))]]
    return _only(chosen, len(covariances))


def _number(share: float, num_tokens: int) -> int:
    return max(1, int(share * num_tokens))


def _only(places: Tensor, number: int) -> Tensor:
    selected = places.new_zeros(number)
    selected[places] = 1
    return selected > 0


SELECTIONS: dict[str, Selection] = {
    "top_entropy": Selection(
        _top_entropy,
        "keep",
        lambda how: f"the {how.share:g} of the tokens with the largest entropy",
        presets={"top_entropy": {"selection": {"type": "top_entropy", "share": 0.2}}},
    ),
    "second_moment": Selection(
        _second_moment,
        "keep",
        lambda how: (
            "as many tokens as possible whose mean (log pi_proximal - log pi_rollout)^2 is below "
            f"{how.high:g}"
        ),
        presets={
            "m2po": {
                "surrogate": "ratio",
                "denominator": "rollout",
                "dual_clip": None,
                "selection": {"type": "second_moment", "high": 0.04},
            }
        },
    ),
    "top_covariance": Selection(
        _top_covariance,
        "mark",
        lambda how: f"the {how.share:g} of the tokens with the largest (A - mean)(log pi - mean)",
    ),
    "random_covariance": Selection(
        _random_covariance,
        "drop",
        lambda how: (
            f"{how.share:g} of the tokens, at random among those whose (A - mean)(log pi - mean) "
            f"is in ({how.low:g}, {how.high:g})"
        ),
        presets={
            "clip_cov": {
                "dual_clip": None,
                "selection": {"type": "random_covariance", "share": 2e-4, "low": 1.0, "high": 5.0},
            }
        },
    ),
}
