"""From logprobs to one differentiable number: ratio, surrogate, correction, aggregation.

Everything here is a pure function of tensors and an `AlgorithmConfig`; no model, no device, no
state. A method is a choice from the four tables at the end of the file: `RATIO_LEVELS`,
`SURROGATES`, `CORRECTIONS`, `AGGREGATIONS`.

Two invariants are kept:

* A token outside the mask has no influence. Its slots may hold NaN or infinities: they are replaced
  *before* any arithmetic, so that neither the loss nor a gradient can see them.
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

from tir_alp.algorithm.presets import AlgorithmConfig, CorrectionConfig, KLConfig, RejectionConfig

MAX_LOG_RATIO = 20.0
"""Log ratios are clamped to +-20 before `exp`; beyond it a token has no gradient."""


@dataclass(frozen=True, slots=True)
class LossInputs:
    """What the loss of one micro-batch is computed from: a row a sequence, a column a token.

    Example, two sequences, of which the second has one loss token (`*`: may hold anything):

        logprobs   = [[-0.1, -1.2], [-0.7, *]]      loss_mask  = [[1, 1], [1, 0]]
        rollout    = [[-0.3, -1.0], [-1.5, *]]      advantages = [+1, -1]
    """

    logprobs: Tensor
    """[B, T] of the current policy, or under ALP of the perturbed one; carries the gradient."""
    rollout_logprobs: Tensor
    """[B, T] of the policy that sampled the tokens, as its engine reported them."""
    advantages: Tensor
    """[B], or [B, T] where credit differs from token to token."""
    loss_mask: Tensor
    """[B, T] bool: which tokens enter the loss."""
    proximal_logprobs: Tensor | None = None
    """[B, T] of the trainer's own forward at the start of the step."""
    reference_logprobs: Tensor | None = None
    """[B, T] of the frozen initial policy."""
    turn_ids: Tensor | None = None
    """[B, T] int64: index of the turn a token belongs to; read where the mask is True."""


class LossCounts(NamedTuple):
    """The denominators of a loss. Those of micro-batches and of ranks add up."""

    num_loss_tokens: Tensor
    """Tokens that count in the mean, a scalar."""
    num_sequences: Tensor
    """Sequences that have such tokens, a scalar."""


Metrics = dict[str, Tensor]


def policy_loss(
    inputs: LossInputs,
    algorithm: AlgorithmConfig,
    num_loss_tokens: float | Tensor | None = None,
    num_sequences: float | Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Loss of one micro-batch, and what to log about it.

    With log ratio l_t = logprobs - denominator_logprobs and r_t = exp(clamp(level(l)_t, +-20)):

        loss = aggregate_t( weight_t * surrogate(r_t, A_t) + coefficient * kl_t )

    Args:
        inputs: The micro-batch.
        algorithm: The method.
        num_loss_tokens: Loss tokens of the *whole* optimizer step: the sum of the `loss_counts` of
            its micro-batches, over all ranks. None: those of `inputs`.
        num_sequences: Likewise the sequences with loss tokens of the whole optimizer step.

    Returns:
        The scalar loss, and detached scalars. Each metric, like the loss, is a sum over the tokens
        at hand divided by the count of the whole step, so that *adding* those of all micro-batches
        gives the mean over the step. `loss/rejected_tokens` is a count.
    """
    weights, mask = _weights(inputs, algorithm)
    counts = _counts(mask)
    num_tokens = _at_least_one(
        counts.num_loss_tokens if num_loss_tokens is None else num_loss_tokens
    )
    num_sequences = _at_least_one(counts.num_sequences if num_sequences is None else num_sequences)

    level_log_ratios = _level_log_ratios(inputs, algorithm)
    logprobs = _fill(inputs.logprobs, mask)
    token_losses, clipped = SURROGATES[algorithm.surrogate](
        _exp(level_log_ratios), logprobs, _token_advantages(inputs, mask), algorithm
    )
    token_losses = weights * token_losses

    def mean(values: Tensor) -> Tensor:
        return _fill(values.detach().to(logprobs.dtype), mask).sum() / num_tokens

    fractions = {f"loss/clip_fraction_{side}": mean(where) for side, where in clipped.items()}
    metrics = {
        "loss/clip_fraction": sum(fractions.values(), torch.zeros_like(num_tokens)),
        **fractions,
        "loss/clamped_fraction": mean(level_log_ratios.abs() > MAX_LOG_RATIO),
        "kl/rollout": mean(_fill(inputs.rollout_logprobs, mask) - logprobs),
    }
    if algorithm.correction is not None:
        metrics["loss/correction_mean"] = mean(weights)
    if algorithm.correction is not None or algorithm.rejection is not None:
        metrics["loss/rejected_tokens"] = (inputs.loss_mask & (weights == 0)).sum()
    if algorithm.kl is not None:
        reference = _fill(_required(inputs.reference_logprobs, "reference_logprobs"), mask)
        kl = _kl(reference - logprobs, algorithm.kl)
        token_losses = token_losses + algorithm.kl.coefficient * kl
        metrics["kl/reference"] = mean(kl)

    loss = AGGREGATIONS[algorithm.aggregation](token_losses, mask, num_tokens, num_sequences)
    metrics["loss/value"] = loss.detach()
    return loss, metrics


def loss_counts(inputs: LossInputs, algorithm: AlgorithmConfig) -> LossCounts:
    """Count what `policy_loss` divides by; add the counts of a step up and pass the sums to it.

    These are the tokens of the mask, less those that a correction or rejection with
    `normalise="kept"` takes out. Only `loss_mask`, and with one of these the rollout and proximal
    logprobs and `turn_ids`, are read: no forward of the current policy is needed first.
    """
    return _counts(_weights(inputs, algorithm)[1])


def log_ratios(inputs: LossInputs, algorithm: AlgorithmConfig) -> Tensor:
    """Log ratio of each token, l_t = logprobs - denominator; [B, T], 0 outside the mask: (3)."""
    mask = inputs.loss_mask
    return _fill(inputs.logprobs, mask) - _fill(_denominator(inputs, algorithm), mask)


@torch.no_grad()
def clipped_tokens(inputs: LossInputs, algorithm: AlgorithmConfig) -> dict[str, Tensor]:
    """The loss tokens whose ratio is beyond a bound, by side (`low`, `high`, `dual`); [B, T] each.

    The sides are those that the surrogate has. What a correction rejects is not looked at.
    """
    mask = inputs.loss_mask
    clipped = SURROGATES[algorithm.surrogate](
        _exp(_level_log_ratios(inputs, algorithm)),
        _fill(inputs.logprobs, mask),
        _token_advantages(inputs, mask),
        algorithm,
    )[1]
    return {side: where & mask for side, where in clipped.items()}


# ------------------------------------------------------------------ levels: over what is the ratio?
#
# Each takes the token log ratios [B, T], which are 0 outside the mask, to the log ratio that
# stands at each token.


def _token(log_ratios: Tensor, inputs: LossInputs) -> Tensor:
    """The token's own, l_t."""
    return log_ratios


def _sequence(log_ratios: Tensor, inputs: LossInputs) -> Tensor:
    """R = sum over the sequence, at each of its tokens."""
    return _straight_through(log_ratios.sum(-1, keepdim=True), log_ratios)


def _sequence_geometric(log_ratios: Tensor, inputs: LossInputs) -> Tensor:
    """R / (number of loss tokens): the log of the geometric mean of the token ratios."""
    lengths = inputs.loss_mask.sum(-1, keepdim=True).clamp(min=1)
    return _straight_through(log_ratios.sum(-1, keepdim=True) / lengths, log_ratios)


def _turn(log_ratios: Tensor, inputs: LossInputs) -> Tensor:
    """The sum over the tokens of the same turn."""
    turn_ids = _required(inputs.turn_ids, "turn_ids")
    index = torch.where(inputs.loss_mask, turn_ids, 0)  # a turn has a token, so its id is below T
    sums = torch.zeros_like(log_ratios).scatter_add(-1, index, log_ratios.detach())
    return _straight_through(sums.gather(-1, index), log_ratios)


def _turn_geometric(log_ratios: Tensor, inputs: LossInputs) -> Tensor:
    """The mean over the tokens of the same turn."""
    mask = inputs.loss_mask.to(log_ratios.dtype)
    lengths = _turn(mask, inputs).clamp(min=1)
    return _straight_through(_turn(log_ratios, inputs) / lengths, log_ratios)


def _cumulative(log_ratios: Tensor, inputs: LossInputs) -> Tensor:
    """The sum over the tokens up to and with t."""
    return _straight_through(log_ratios.cumsum(-1), log_ratios)


def _cumulative_geometric(log_ratios: Tensor, inputs: LossInputs) -> Tensor:
    """The mean over the tokens up to and with t."""
    lengths = inputs.loss_mask.cumsum(-1).clamp(min=1)
    return _straight_through(log_ratios.cumsum(-1) / lengths, log_ratios)


def _straight_through(values: Tensor, log_ratios: Tensor) -> Tensor:
    """Equation (4): the value of `values`, the gradient of the token's own log ratio."""
    return values.detach() + (log_ratios - log_ratios.detach())


# ------------------------------------------------------- surrogates: what is made of the ratio?
#
# Each takes ratios, logprobs and advantages, all [B, T], to token losses [B, T] and to the tokens
# that were clipped, by side. A new method is a function here and a line in SURROGATES.


def _clip(
    ratios: Tensor, logprobs: Tensor, advantages: Tensor, algorithm: AlgorithmConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO: max(-A r, -A clip(r)), and for A < 0 at most -A c: equation (5)."""
    low, high = 1 - algorithm.clip_low, 1 + algorithm.clip_high
    losses = torch.maximum(-advantages * ratios, -advantages * ratios.clamp(low, high))
    clipped = {
        "low": (advantages < 0) & (ratios < low),
        "high": (advantages > 0) & (ratios > high),
    }
    if algorithm.dual_clip is not None:
        clipped["dual"] = (advantages < 0) & (ratios > algorithm.dual_clip)
        losses = torch.where(clipped["dual"], -advantages * algorithm.dual_clip, losses)
    return losses, clipped


def _cispo(
    ratios: Tensor, logprobs: Tensor, advantages: Tensor, algorithm: AlgorithmConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """-sg[clip(r)] A log pi: a clipped token keeps a gradient, with a bounded weight."""
    low, high = 1 - algorithm.clip_low, 1 + algorithm.clip_high
    losses = -ratios.detach().clamp(low, high) * advantages * logprobs
    return losses, {"low": ratios < low, "high": ratios > high}


def _reinforce(
    ratios: Tensor, logprobs: Tensor, advantages: Tensor, algorithm: AlgorithmConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """-A log pi: no ratio and no clip; what is off-policy is left to the correction."""
    return -advantages * logprobs, {}


# ----------------------------------------------- corrections: a weight against engine mismatch
#
# Each takes weights w = proximal / rollout, at the correction's level, to the weights in use. A
# rejection takes tokens out besides, by a window of its own and by a veto.


def _truncate(weights: Tensor, correction: CorrectionConfig) -> Tensor:
    """min(w, high)."""
    return weights.clamp(max=correction.high)


def _reject(weights: Tensor, correction: CorrectionConfig) -> Tensor:
    """W inside [low, high], both included, else 0."""
    inside = (weights >= correction.low) & (weights <= correction.high)
    return torch.where(inside, weights, 0)


def _is_kept(token_ratios: Tensor, level_ratios: Tensor, rejection: RejectionConfig) -> Tensor:
    """Inside [low, high] at the level, both included, in a sequence that no token vetoes."""
    kept = level_ratios >= rejection.low
    if rejection.high is not None:
        kept = kept & (level_ratios <= rejection.high)
    return kept & ~(token_ratios < rejection.veto).any(-1, keepdim=True)


@torch.no_grad()
def _weights(inputs: LossInputs, algorithm: AlgorithmConfig) -> tuple[Tensor, Tensor]:
    """The weight of each token, and the mask of the tokens that count in the mean; both [B, T]."""
    mask = counted = inputs.loss_mask
    weights = torch.ones_like(inputs.rollout_logprobs)
    correction, rejection = algorithm.correction, algorithm.rejection
    if correction is None and rejection is None:
        return weights, counted
    proximal = _required(inputs.proximal_logprobs, "proximal_logprobs")
    mismatch = _fill(proximal, mask) - _fill(inputs.rollout_logprobs, mask)
    if correction is not None:
        ratios = _exp(RATIO_LEVELS[correction.level](mismatch, inputs))
        weights = CORRECTIONS[correction.type](ratios, correction)
        if correction.normalise == "kept":
            counted = counted & (weights > 0)
    if rejection is not None:
        ratios = _exp(RATIO_LEVELS[rejection.level](mismatch, inputs))
        kept = _is_kept(_exp(mismatch), ratios, rejection)
        weights = torch.where(kept, weights, 0)
        if rejection.normalise == "kept":
            counted = counted & kept
    return weights, counted


# ------------------------------------------------------ aggregations: from tokens to one number
#
# Token losses [B, T] are 0 outside the mask; the counts are those of the whole optimizer step.


def _token_mean(losses: Tensor, mask: Tensor, num_tokens: Tensor, num_sequences: Tensor) -> Tensor:
    """Every token weighs the same."""
    return losses.sum() / num_tokens


def _sequence_mean_token_mean(
    losses: Tensor, mask: Tensor, num_tokens: Tensor, num_sequences: Tensor
) -> Tensor:
    """Every sequence weighs the same, and within it every token."""
    return (losses.sum(-1) / mask.sum(-1).clamp(min=1)).sum() / num_sequences


def _sequence_mean_token_sum(
    losses: Tensor, mask: Tensor, num_tokens: Tensor, num_sequences: Tensor
) -> Tensor:
    """A sequence weighs as much as it is long."""
    return losses.sum() / num_sequences


# ------------------------------------------------------------------------- distance to a reference
#
# Each takes d = reference - current logprob to an estimate of KL(current || reference).


def _k1(difference: Tensor) -> Tensor:
    """-d: unbiased, and noisy."""
    return -difference


def _k2(difference: Tensor) -> Tensor:
    """d^2 / 2."""
    return difference.square() / 2


def _k3(difference: Tensor) -> Tensor:
    """e^d - d - 1: unbiased, and never negative."""
    return _exp(difference) - difference - 1


def _kl(difference: Tensor, config: KLConfig) -> Tensor:
    """The value of the estimator, with its own gradient or with that of k2."""
    value = KL_ESTIMATORS[config.estimator](difference)
    if config.gradient == "estimator":
        return value
    k2 = _k2(difference)
    return value.detach() + (k2 - k2.detach())


# ----------------------------------------------------------------------------------------- helpers


def _fill(values: Tensor, mask: Tensor) -> Tensor:
    """Values, 0 outside the mask; whatever stood there touches neither value nor gradient."""
    return torch.where(mask, values, 0)


def _exp(log_ratios: Tensor) -> Tensor:
    """Ratios, between e^-20 and e^20."""
    return log_ratios.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _level_log_ratios(inputs: LossInputs, algorithm: AlgorithmConfig) -> Tensor:
    """Log ratio that stands at each token, at the algorithm's level; [B, T]."""
    return RATIO_LEVELS[algorithm.ratio_level](log_ratios(inputs, algorithm), inputs)


def _token_advantages(inputs: LossInputs, mask: Tensor) -> Tensor:
    advantages = inputs.advantages
    return _fill(advantages if advantages.dim() == 2 else advantages[:, None], mask)


def _denominator(inputs: LossInputs, algorithm: AlgorithmConfig) -> Tensor:
    if algorithm.denominator == "rollout":
        return inputs.rollout_logprobs
    return _required(inputs.proximal_logprobs, "proximal_logprobs")


def _counts(mask: Tensor) -> LossCounts:
    return LossCounts(mask.sum(), mask.any(-1).sum())


def _at_least_one(count: float | Tensor) -> Tensor:
    return torch.as_tensor(count).clamp(min=1)


def _required(tensor: Tensor | None, name: str) -> Tensor:
    if tensor is None:
        raise ValueError(f"the algorithm reads {name}, but LossInputs.{name} is None")
    return tensor


RatioLevel = Callable[[Tensor, LossInputs], Tensor]
Surrogate = Callable[[Tensor, Tensor, Tensor, AlgorithmConfig], tuple[Tensor, dict[str, Tensor]]]
Aggregation = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

RATIO_LEVELS: Mapping[str, RatioLevel] = {
    "token": _token,
    "sequence": _sequence,
    "sequence_geometric": _sequence_geometric,
    "turn": _turn,
    "turn_geometric": _turn_geometric,
    "cumulative": _cumulative,
    "cumulative_geometric": _cumulative_geometric,
}
SURROGATES: Mapping[str, Surrogate] = {"clip": _clip, "cispo": _cispo, "reinforce": _reinforce}
CORRECTIONS: Mapping[str, Callable[[Tensor, CorrectionConfig], Tensor]] = {
    "tis": _truncate,
    "mis": _reject,
    "icepop": _reject,
}
AGGREGATIONS: Mapping[str, Aggregation] = {
    "token_mean": _token_mean,
    "sequence_mean_token_mean": _sequence_mean_token_mean,
    "sequence_mean_token_sum": _sequence_mean_token_sum,
}
KL_ESTIMATORS: Mapping[str, Callable[[Tensor], Tensor]] = {"k1": _k1, "k2": _k2, "k3": _k3}
