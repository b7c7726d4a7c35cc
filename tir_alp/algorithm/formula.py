"""A method written out as a formula, in the words of `docs/algorithm.md`."""

from __future__ import annotations

from tir_alp.algorithm.presets import AlgorithmConfig, CorrectionConfig, RejectionConfig

_LEVELS = {
    "token": "log r_t = l_t",
    "sequence": "log r_t = sum_s l_s",
    "sequence_geometric": "log r_t = mean_s l_s",
    "turn": "log r_t = sum of l_s over the turn of t",
    "turn_geometric": "log r_t = mean of l_s over the turn of t",
    "cumulative": "log r_t = sum_{s<=t} l_s",
    "cumulative_geometric": "log r_t = mean_{s<=t} l_s",
}
_AGGREGATIONS = {
    "token_mean": "mean over tokens",
    "sequence_mean_token_mean": "mean over sequences of the mean over tokens",
    "sequence_mean_token_sum": "mean over sequences of the sum over tokens",
}


def formula(algorithm: AlgorithmConfig) -> str:
    """Lines of text that say what is minimised."""
    noise = algorithm.perturbation
    numerator = "log pi(y_t)" if noise is None else "log pi_perturbed(y_t)"
    low, high = 1 - algorithm.clip_low, 1 + algorithm.clip_high
    surrogate = {
        "clip": f"max(-A r_t, -A clip(r_t, {low:g}, {high:g}))",
        "cispo": f"-sg[clip(r_t, {low:g}, {high:g})] A log pi(y_t)",
        "reinforce": "-A log pi(y_t)",
    }[algorithm.surrogate]
    if algorithm.surrogate == "clip" and algorithm.dual_clip is not None:
        surrogate += f", and for A < 0 at most -{algorithm.dual_clip:g} A"
    lines = [
        f"{algorithm.name}: minimise the {_AGGREGATIONS[algorithm.aggregation]} of L_t",
        f"  l_t = {numerator} - log pi_{algorithm.denominator}(y_t)",
        f"  {_LEVELS[algorithm.ratio_level]}",
        f"  L_t = {surrogate}",
        f"  A   = {algorithm.advantage} advantages of the group",
    ]
    if algorithm.correction is not None:
        lines.append(_correction(algorithm.correction))
    if algorithm.rejection is not None:
        lines += _rejection(algorithm.rejection)
    if algorithm.kl is not None:
        how = algorithm.kl
        borrowed = "" if how.gradient == "estimator" else f", with the gradient of {how.gradient}"
        lines.append(f"  + {how.coefficient:g} {how.estimator}(pi, pi_reference){borrowed}")
    if noise is not None:
        layers = "every layer" if noise.layers is None else f"layers {noise.layers}"
        where = f"into {layers}" if noise.site == "hidden" else "on the logits"
        learnt = "learnt" if noise.learnable else "fixed"
        unit = "" if noise.scale == "absolute" else " RMS(h)"
        lines.append(
            f"  pi_perturbed: h' = h + sigma{unit} eps {where}, sigma {noise.init_std:g}, "
            f"{learnt}; the training forward only"
        )
        if noise.draws > 1:
            pairs = " in antithetic pairs" if noise.antithetic else ""
            lines.append(f"  L_t is averaged over {noise.draws} draws of eps{pairs}")
    return "\n".join(lines)


def _correction(how: CorrectionConfig) -> str:
    ratio = f"{how.level} ratio pi_proximal / pi_rollout"
    what = (
        f"min({ratio}, {how.high:g})"
        if how.type == "tis"
        else f"{ratio} where it is in [{how.low:g}, {how.high:g}], else 0"
    )
    return f"  L_t is multiplied by w = {what} ({how.type}, no gradient)"


def _rejection(how: RejectionConfig) -> list[str]:
    counted = "counted" if how.normalise == "all" else "not counted"
    lines = []
    if how.low > 0 or how.high is not None:
        high = "inf" if how.high is None else f"{how.high:g}"
        lines.append(
            f"  rejected, {counted}: tokens whose {how.level} ratio pi_proximal / pi_rollout is "
            f"outside [{how.low:g}, {high}]"
        )
    if how.veto > 0:
        lines.append(
            f"  rejected, {counted}: sequences with a token whose ratio is below {how.veto:g}"
        )
    return lines
