"""Rejections: which tokens leave the loss because two policies disagree on them?

A rejection measures the disagreement of a numerator policy with the policy that sampled, forms the
measure at a level, and keeps the tokens inside a window. Rejections compose: a token stays if all
of them keep it. Importing this module does not import torch: tensors are only touched through their
own methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from tir_alp.algorithm.levels import RATIO_LEVELS, clamped_exp
from tir_alp.algorithm.surrogates import binary_kl

if TYPE_CHECKING:
    from torch import Tensor

    from tir_alp.algorithm.inputs import LossInputs
    from tir_alp.algorithm.presets import CriterionConfig, RejectionConfig

Measure = Callable[["Tensor", "Tensor"], "Tensor"]
"""Maps logprobs of the numerator and rollout logprobs of tokens to their disagreement."""


def _k3(logprobs: Tensor, rollout: Tensor) -> Tensor:
    difference = logprobs - rollout
    return clamped_exp(difference) - difference - 1


def _binary_kl(logprobs: Tensor, rollout: Tensor) -> Tensor:
    return binary_kl(logprobs, rollout).maximum(binary_kl(rollout, logprobs))


MEASURES: dict[str, tuple[Measure, str]] = {
    "k1": (lambda logprobs, rollout: rollout - logprobs, "-l"),
    "k2": (lambda logprobs, rollout: (logprobs - rollout).square() / 2, "l^2 / 2"),
    "k3": (_k3, "e^l - l - 1"),
    "binary_kl": (_binary_kl, "the larger of binary KL(p, q) and KL(q, p)"),
    "binary_tv": (lambda logprobs, rollout: (logprobs.exp() - rollout.exp()).abs(), "|p - q|"),
}
"""Name -> function, and formula with p = pi_numerator(y_t), q = pi_rollout(y_t), l = log p - log q.

Besides these there is `ratio`, e^l at a ratio level.
"""


def each_of(rejection: RejectionConfig) -> Iterator[CriterionConfig]:
    """Yield the criteria of a rejection: its own, and those that it is combined with."""
    yield rejection
    yield from rejection.also


def is_kept(
    logprobs: Tensor, rollout: Tensor, rejection: CriterionConfig, inputs: LossInputs
) -> Tensor:
    """Return which tokens one criterion keeps: [B, T] bool.

    Args:
        logprobs: [B, T] logprobs of the numerator, 0 outside the mask.
        rollout: [B, T] rollout logprobs, 0 outside the mask.
        rejection: The criterion.
        inputs: The micro-batch, for its mask, turns and advantages.
    """
    log_ratios = logprobs - rollout
    if rejection.measure == "ratio":
        values = clamped_exp(_at_level(log_ratios, rejection.level, inputs))
    else:
        measure = MEASURES[rejection.measure][0]
        values = _at_level(measure(logprobs, rollout) * inputs.loss_mask, rejection.level, inputs)
    kept = values >= rejection.low if rejection.measure != "k1" else values == values
    if rejection.high is not None:
        kept = kept & (values <= rejection.high)
    kept = kept & ~(clamped_exp(log_ratios) < rejection.veto).any(-1, keepdim=True)
    if rejection.only_negative:
        advantages = inputs.token_wise_advantages()
        kept = kept | (advantages >= 0)
    return kept


def _at_level(values: Tensor, level: str, inputs: LossInputs) -> Tensor:
    """Form a sum or a mean over the tokens of a level, or the largest value of the sequence."""
    if level == "sequence_max":
        return (
            values.where(inputs.loss_mask, -float("inf"))
            .amax(-1, keepdim=True)
            .expand(values.shape)
        )
    return RATIO_LEVELS[level].function(values, inputs)


def formula(rejection: CriterionConfig) -> list[str]:
    """Write what a criterion takes out, as lines."""
    counted = "counted" if rejection.normalise == "all" else "not counted"
    which = "tokens" if not rejection.only_negative else "tokens with A < 0"
    policies = f"pi_{rejection.numerator} / pi_rollout"
    lines = []
    if rejection.low > 0 or rejection.high is not None:
        high = "inf" if rejection.high is None else f"{rejection.high:g}"
        if rejection.measure == "ratio":
            lines.append(
                f"  rejected, {counted}: {which} whose {rejection.level} ratio {policies} is "
                f"outside [{rejection.low:g}, {high}]"
            )
        else:
            window = (
                f"above {high}" if not rejection.low else f"outside [{rejection.low:g}, {high}]"
            )
            lines.append(
                f"  rejected, {counted}: {which} whose {rejection.measure} of {policies}, by "
                f"{rejection.level}, is {window}; {rejection.measure} = "
                f"{MEASURES[rejection.measure][1]}"
            )
    if rejection.veto > 0:
        lines.append(
            f"  rejected, {counted}: sequences with a token whose ratio is below {rejection.veto:g}"
        )
    return lines
