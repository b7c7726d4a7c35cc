"""Writes a method out as a formula, in the words of `docs/algorithm.md`."""

from __future__ import annotations

from tir_alp.algorithm.advantage import ADVANTAGES, Advantage
from tir_alp.algorithm.aggregations import AGGREGATIONS
from tir_alp.algorithm.corrections import CORRECTIONS, Correction, ratio_text
from tir_alp.algorithm.levels import RATIO_LEVELS
from tir_alp.algorithm.lookup import find
from tir_alp.algorithm.presets import (
    AlgorithmConfig,
    CorrectionConfig,
    KLConfig,
    PerturbationConfig,
    RejectionConfig,
)
from tir_alp.algorithm.surrogates import SURROGATES, Surrogate


def formula(algorithm: AlgorithmConfig) -> str:
    """Return the objective that is minimised, as lines of text."""
    noise = algorithm.perturbation
    numerator = "log pi(y_t)" if noise is None else "log pi_perturbed(y_t)"
    mean = AGGREGATIONS[algorithm.aggregation].formula
    surrogate = find(algorithm.surrogate, SURROGATES, Surrogate)
    advantage = find(algorithm.advantage, ADVANTAGES, Advantage)
    lines = [
        f"{algorithm.name}: minimise the {mean} of L_t",
        f"  l_t = {numerator} - log pi_{algorithm.denominator}(y_t)",
        f"  {RATIO_LEVELS[algorithm.ratio_level].formula}",
        f"  L_t = {surrogate.formula(algorithm)}",
        f"  A   = {advantage.formula}",
    ]
    if algorithm.correction is not None:
        lines.append(_correction(algorithm.correction))
    if algorithm.rejection is not None:
        lines += _rejection(algorithm.rejection)
    if algorithm.kl is not None:
        lines.append(_kl(algorithm.kl))
    if noise is not None:
        lines += _perturbation(noise)
    return "\n".join(lines)


def _correction(how: CorrectionConfig) -> str:
    weight = find(how.type, CORRECTIONS, Correction).formula(how)
    return f"  L_t is multiplied by w = {weight} ({how.type}, no gradient)"


def _rejection(how: RejectionConfig) -> list[str]:
    counted = "counted" if how.normalise == "all" else "not counted"
    lines = []
    if how.low > 0 or how.high is not None:
        high = "inf" if how.high is None else f"{how.high:g}"
        lines.append(
            f"  rejected, {counted}: tokens whose {ratio_text(how)} is outside "
            f"[{how.low:g}, {high}]"
        )
    if how.veto > 0:
        lines.append(
            f"  rejected, {counted}: sequences with a token whose ratio is below {how.veto:g}"
        )
    return lines


def _kl(how: KLConfig) -> str:
    borrowed = "" if how.gradient == "estimator" else f", with the gradient of {how.gradient}"
    return f"  + {how.coefficient:g} {how.estimator}(pi, pi_reference){borrowed}"


def _perturbation(noise: PerturbationConfig) -> list[str]:
    layers = "every layer" if noise.layers is None else f"layers {noise.layers}"
    where = f"into {layers}" if noise.site == "hidden" else "on the logits"
    learnt = "learnt" if noise.learnable else "fixed"
    unit = "" if noise.scale == "absolute" else " RMS(h)"
    lines = [
        f"  pi_perturbed: h' = h + sigma{unit} eps {where}, sigma {noise.init_std:g}, "
        f"{learnt}; the training forward only"
    ]
    if noise.draws > 1:
        pairs = " in antithetic pairs" if noise.antithetic else ""
        lines.append(f"  L_t is averaged over {noise.draws} draws of eps{pairs}")
    return lines
