"""From logprobs to one differentiable number: ratio, surrogate, correction, aggregation.

Everything here is a pure function of tensors and an `AlgorithmConfig`: no model, no device, no
state. A method is a choice from the tables `RATIO_LEVELS`, `SURROGATES`, `CORRECTIONS` and
`AGGREGATIONS`, each in a module of its own.

Two invariants hold:

* A token outside the mask has no influence. Its values may be NaN or infinite: they are replaced
  *before* any arithmetic, so that neither the loss nor a gradient depends on them.
* Micro-batches add up. Given the counts of the whole optimizer step, the losses and the metrics of
  its micro-batches sum to those of the step, however it was split.

Equation numbers are those of `docs/algorithm.md`. Axis letters: B sequences, T tokens of the
longest sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tir_alp.algorithm.aggregations import AGGREGATIONS
from tir_alp.algorithm.corrections import CORRECTIONS, Correction
from tir_alp.algorithm.inputs import LossInputs
from tir_alp.algorithm.levels import MAX_LOG_RATIO, RATIO_LEVELS, clamped_exp
from tir_alp.algorithm.lookup import find
from tir_alp.algorithm.presets import AlgorithmConfig, CriterionConfig, KLConfig
from tir_alp.algorithm.rejections import each_of, is_kept
from tir_alp.algorithm.selections import SELECTIONS, Selection
from tir_alp.algorithm.surrogates import SURROGATES, Surrogate

Metrics = dict[str, Tensor]


class LossCounts(NamedTuple):
    """The denominators of a loss. The counts of micro-batches and of ranks add up."""

    num_loss_tokens: Tensor
    """Number of tokens that count in the mean, a scalar."""
    num_sequences: Tensor
    """Number of sequences with such tokens, or the sum of their weights, a scalar."""
    sum_of_weights: Tensor
    """Sum of the correction's weights over these tokens, a scalar."""


@dataclass(frozen=True, slots=True)
class LossTerms:
    """The loss of one micro-batch, and what was found on the way."""

    loss: Tensor
    """A scalar that carries the gradient."""
    metrics: Metrics
    """Detached scalars; see `policy_loss`."""
    clipped: Mapping[str, Tensor]
    """Side -> [B, T] bool, True for the loss tokens that the surrogate clips on that side. Tokens
    that a correction or rejection takes out are included."""


def policy_loss(
    inputs: LossInputs,
    algorithm: AlgorithmConfig,
    num_loss_tokens: float | Tensor | None = None,
    num_sequences: float | Tensor | None = None,
    sum_of_weights: float | Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Compute the loss of one micro-batch, and metrics of it.

    With log ratio l_t = logprobs - denominator_logprobs and r_t = exp(clamp(level(l)_t, +-20)):

        loss = aggregate_t( weight_t * surrogate(r_t, A_t) + coefficient * kl_t )

    Args:
        inputs: The micro-batch.
        algorithm: The method.
        num_loss_tokens: Number of loss tokens in the *whole* optimizer step: the sum of the
            `loss_counts` of its micro-batches over all ranks. None: those of `inputs`.
        num_sequences: Likewise, the number of sequences with loss tokens in the whole step.
        sum_of_weights: Likewise, the sum of correction weights; read if `correction.mean_one`.

    Returns:
        The scalar loss, and detached scalars. Each metric, like the loss, is a sum over the tokens
        of this micro-batch divided by the count of the whole step, so that *adding* the metrics of
        all micro-batches gives the mean over the step. `loss/rejected_tokens` is a count.
    """
    terms = loss_terms(inputs, algorithm, num_loss_tokens, num_sequences, sum_of_weights)
    return terms.loss, terms.metrics


def loss_terms(
    inputs: LossInputs,
    algorithm: AlgorithmConfig,
    num_loss_tokens: float | Tensor | None = None,
    num_sequences: float | Tensor | None = None,
    sum_of_weights: float | Tensor | None = None,
) -> LossTerms:
    """As `policy_loss`; also returns which tokens were clipped."""
    mask = inputs.loss_mask
    weights, counted = _weights(inputs, algorithm)
    counts = _counts(weights, counted, inputs.weights)
    num_tokens = _at_least_one(
        counts.num_loss_tokens if num_loss_tokens is None else num_loss_tokens
    )
    num_sequences = _at_least_one(counts.num_sequences if num_sequences is None else num_sequences)
    if algorithm.correction is not None and algorithm.correction.mean_one:
        total = counts.sum_of_weights if sum_of_weights is None else sum_of_weights
        weights = weights * (num_tokens / torch.as_tensor(total).clamp(min=_TINY))
    weights = _fill(weights, _with_gradient(inputs, algorithm))

    level = RATIO_LEVELS[algorithm.ratio_level].function
    level_log_ratios = level(log_ratios(inputs, algorithm), inputs)
    losses, clipped = _surrogate_losses(clamped_exp(level_log_ratios), inputs, algorithm)
    losses = _fill(weights * losses, counted)

    def mean(values: Tensor) -> Tensor:
        return _fill(values.detach().to(losses.dtype), counted).sum() / num_tokens

    fractions = {f"loss/clip_fraction_{side}": mean(where) for side, where in clipped.items()}
    metrics = {
        "loss/clip_fraction": sum(fractions.values(), torch.zeros_like(num_tokens)),
        **fractions,
        "loss/clamped_fraction": mean(level_log_ratios.abs() > MAX_LOG_RATIO),
    }
    if algorithm.correction is not None:
        metrics["loss/correction_mean"] = mean(weights)
    if algorithm.correction is not None or algorithm.rejection is not None:
        metrics["loss/rejected_tokens"] = (mask & (weights == 0)).sum()
    if algorithm.selection is not None:
        metrics["loss/selected_fraction"] = mean(inputs.require("selected"))
    if algorithm.kl is not None:
        reference = inputs.require("reference_logprobs")
        difference = _fill(reference, counted) - _fill(inputs.logprobs, counted)
        kl = _kl(difference, algorithm.kl)
        if algorithm.kl.weight == "ratio":
            kl = kl * clamped_exp(log_ratios(inputs, algorithm))
        losses = losses + algorithm.kl.coefficient * kl
        metrics["kl/reference"] = mean(kl)

    aggregate = AGGREGATIONS[algorithm.aggregation].function
    loss = aggregate(losses, counted, num_tokens, num_sequences, inputs.weights)
    if algorithm.entropy_bonus:
        entropy = _fill(inputs.require("entropy"), counted).sum() / num_tokens
        loss = loss - algorithm.entropy_bonus * entropy
    metrics["loss/value"] = loss.detach()
    return LossTerms(loss, metrics, clipped)


def loss_counts(inputs: LossInputs, algorithm: AlgorithmConfig) -> LossCounts:
    """Count what `policy_loss` divides by; sum the counts of a step and pass the sums to it.

    The tokens of the mask count, except those that a correction or rejection with
    `normalise="kept"` takes out. Only `loss_mask` is read, and for a correction or rejection the
    rollout and proximal logprobs and `turn_ids`: no forward of the current policy is needed first.
    """
    return _counts(*_weights(inputs, algorithm), inputs.weights)


def log_ratios(inputs: LossInputs, algorithm: AlgorithmConfig) -> Tensor:
    """Return l_t = logprobs - denominator, equation (3): [B, T], 0 outside the mask."""
    mask = inputs.loss_mask
    return _fill(inputs.logprobs, mask) - _fill(_denominator(inputs, algorithm), mask)


def _surrogate_losses(
    ratios: Tensor, inputs: LossInputs, algorithm: AlgorithmConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of each token, and by side which tokens of the mask are clipped."""
    mask, advantages = inputs.loss_mask, inputs.advantages
    surrogate = find(algorithm.surrogate, SURROGATES, Surrogate)
    losses, clipped = surrogate.function(
        ratios,
        _fill(inputs.logprobs, mask),
        _fill(advantages if advantages.dim() == 2 else advantages[:, None], mask),
        algorithm,
        **{name: _fill(inputs.require(name), mask) for name in surrogate.reads},
    )
    if unnamed := clipped.keys() - surrogate.sides:
        raise ValueError(
            f"the surrogate {algorithm.surrogate!r} clips on the sides {sorted(unnamed)}, which "
            f"its entry does not name: sides={surrogate.sides}"
        )
    return losses, {side: where & mask for side, where in clipped.items()}


@torch.no_grad()
def _weights(inputs: LossInputs, algorithm: AlgorithmConfig) -> tuple[Tensor, Tensor]:
    """Return the weight of each token, and which tokens count in the mean; both [B, T]."""
    mask = counted = inputs.loss_mask
    weights = torch.ones_like(inputs.rollout_logprobs)
    correction, rejection = algorithm.correction, algorithm.rejection
    if correction is None and rejection is None:
        return weights, counted
    if correction is not None:
        proximal = inputs.require("proximal_logprobs")
        mismatch = _fill(proximal, mask) - _fill(inputs.rollout_logprobs, mask)
        ratios = clamped_exp(RATIO_LEVELS[correction.level].function(mismatch, inputs))
        weights = find(correction.type, CORRECTIONS, Correction).function(ratios, correction)
        if correction.normalise == "kept":
            counted = counted & (weights > 0)
    for each in () if rejection is None else each_of(rejection):
        if each.numerator == "proximal":
            kept = _is_kept(inputs, inputs.require("proximal_logprobs"), each)
            weights = _fill(weights, kept)
            if each.normalise == "kept":
                counted = counted & kept
    return weights, counted


@torch.no_grad()
def _with_gradient(inputs: LossInputs, algorithm: AlgorithmConfig) -> Tensor:
    """Return the tokens that a selection, or a rejection by the current policy, leaves: [B, T].

    Tokens that are taken out count in the mean all the same.
    """
    left = inputs.loss_mask
    for each in () if algorithm.rejection is None else each_of(algorithm.rejection):
        if each.numerator == "current":
            left = left & _is_kept(inputs, inputs.logprobs, each)
    if (how := algorithm.selection) is not None:
        effect = find(how.type, SELECTIONS, Selection).effect
        selected = inputs.require("selected")
        if effect != "mark":
            left = left & (selected if effect == "keep" else ~selected)
    return left


def _is_kept(inputs: LossInputs, logprobs: Tensor, rejection: CriterionConfig) -> Tensor:
    mask = inputs.loss_mask
    above, below = _fill(logprobs, mask), _fill(inputs.rollout_logprobs, mask)
    return is_kept(above, below, rejection, inputs)


# ------------------------------------------------------------------------- distance to a reference
#
# Each estimator maps d = reference - current logprob to an estimate of KL(current || reference).


def _k1(difference: Tensor) -> Tensor:
    """-d: unbiased, but noisy."""
    return -difference


def _k2(difference: Tensor) -> Tensor:
    """d^2 / 2."""
    return difference.square() / 2


def _k3(difference: Tensor) -> Tensor:
    """e^d - d - 1: unbiased, and never negative."""
    return clamped_exp(difference) - difference - 1


KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {"k1": _k1, "k2": _k2, "k3": _k3}


def _kl(difference: Tensor, config: KLConfig) -> Tensor:
    """Return the value of the estimator, with its own gradient or with that of k2."""
    value = KL_ESTIMATORS[config.estimator](difference)
    if config.gradient == "estimator":
        return value
    k2 = _k2(difference)
    return value.detach() + (k2 - k2.detach())


# ----------------------------------------------------------------------------------------- helpers


def _fill(values: Tensor, mask: Tensor) -> Tensor:
    """Replace values outside the mask by 0, so that they affect neither value nor gradient."""
    return torch.where(mask, values, 0)


def _denominator(inputs: LossInputs, algorithm: AlgorithmConfig) -> Tensor:
    if algorithm.denominator == "rollout":
        return inputs.rollout_logprobs
    return inputs.require("proximal_logprobs")


_TINY = 1e-8


def _counts(weights: Tensor, counted: Tensor, of_sequences: Tensor | None) -> LossCounts:
    """Count; `of_sequences` [B] are the weights of the sequences, None for 1."""
    has_any = counted.any(-1)
    num_sequences = has_any.sum() if of_sequences is None else (has_any * of_sequences).sum()
    return LossCounts(
        counted.sum(), num_sequences, _fill(weights, counted).sum(dtype=torch.float64)
    )


def _at_least_one(count: float | Tensor) -> Tensor:
    return torch.as_tensor(count).clamp(min=1)
