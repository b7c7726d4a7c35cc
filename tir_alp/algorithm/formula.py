"""Writes a method out as a formula, in the words of `docs/algorithm.md`."""

from __future__ import annotations

from tir_alp.algorithm import rejections
from tir_alp.algorithm.advantage import ADVANTAGES, Advantage
from tir_alp.algorithm.aggregations import AGGREGATIONS
from tir_alp.algorithm.corrections import CORRECTIONS, Correction
from tir_alp.algorithm.levels import RATIO_LEVELS
from tir_alp.algorithm.lookup import find
from tir_alp.algorithm.presets import (
    AlgorithmConfig,
    CorrectionConfig,
    KLConfig,
    PerturbationConfig,
    SelectionConfig,
)
from tir_alp.algorithm.selections import SELECTIONS, Selection
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
        *_proximal(algorithm),
        f"  {RATIO_LEVELS[algorithm.ratio_level].formula}",
        f"  L_t = {surrogate.formula(algorithm)}",
        f"  A   = {advantage.formula}",
    ]
    if algorithm.correction is not None:
        lines.append(_correction(algorithm.correction))
    if algorithm.rejection is not None:
        for each in rejections.each_of(algorithm.rejection):
            lines += rejections.formula(each)
    if algorithm.selection is not None:
        lines.append(_selection(algorithm.selection))
    if algorithm.entropy_bonus:
        lines.append(f"  - {algorithm.entropy_bonus:g} mean entropy of pi")
    if algorithm.kl is not None:
        lines.append(_kl(algorithm.kl))
    if noise is not None:
        lines += _perturbation(noise)
    if algorithm.step_scale == "ess":
        lines.append("  the learning rate is multiplied by sqrt(ESS) of the sequences' ratios")
    if (how := algorithm.acceptance) is not None:
        lines.append(
            "  undone if -mean_i((pi(y_i) / pi_rollout(y_i))^(1 / length) A_i) after it is below "
            f"-{how.tolerance:g} (-{how.last_tolerance:g} after {how.tolerance_steps} steps)"
        )
    return "\n".join(lines)


def _proximal(algorithm: AlgorithmConfig) -> list[str]:
    texts = {
        "rollout_version": "the trainer's policy with the weights that sampled the token",
        "interpolated": "pi^(d / (d + 1)) pi_rollout^(1 / (d + 1)) of a token d steps old, fixed",
    }
    text = texts.get(algorithm.proximal)
    return [] if text is None else [f"  pi_proximal is {text}"]


def _correction(how: CorrectionConfig) -> str:
    weight = find(how.type, CORRECTIONS, Correction).formula(how)
    scaled = ", divided by its mean" if how.mean_one else ""
    return f"  L_t is multiplied by w = {weight}{scaled} ({how.type}, no gradient)"


_EFFECTS = {"keep": "only", "drop": "no gradient:", "mark": "selected:"}


def _selection(how: SelectionConfig) -> str:
    found = find(how.type, SELECTIONS, Selection)
    return f"  {_EFFECTS[found.effect]} {found.formula(how)}, of the update, under pi_proximal"


def _kl(how: KLConfig) -> str:
    borrowed = "" if how.gradient == "estimator" else f", with the gradient of {how.gradient}"
    weight = "" if how.weight == "none" else "e^l_t "
    return f"  + {how.coefficient:g} {weight}{how.estimator}(pi, pi_reference){borrowed}"


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
