"""Metrics of a step's ratios: how far the policy that is trained is from the one that sampled.

Ratios here are always those of the policy that is trained (under ALP, the perturbed one) over the
policy that sampled, whatever the denominator of the loss, so that methods with different
denominators can be compared. `docs/metrics.md` defines each name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from tir_alp.algorithm.levels import clamped_exp
from tir_alp.algorithm.ratio_summary import MAX_TURNS, RatioSummary, TokenSlice, quantiles

PERCENTILES = (2, 5, 25, 50, 75, 95, 98)
"""Percentiles of ratios that are reported at each level."""

_ENVELOPE = (2, 50, 98)  # percentiles of ratios that are reported for a slice of the tokens


def ratio_metrics(summary: RatioSummary) -> dict[str, float]:
    """Describe the ratios of a step: by sequence, by turn, by token, and by slices of the tokens.

    `ratio/p<n>` are percentiles of the sequence ratios, `ratio/turn_p<n>` of the turn ratios and
    `ratio/token_p<n>` of the token ratios. The slices are `turn_<n>` for the turns that occur,
    `positive` and `negative` by advantage, and `after_tool_positive` and `after_tool_negative` for
    those among the first tokens after an observation.

    Returns:
        The metrics; empty if there were no tokens.
    """
    tokens = summary.tokens()
    if not tokens.num_tokens:
        return {}
    slices = {
        **{f"turn_{turn}": summary.tokens(turn=turn) for turn in range(MAX_TURNS)},
        **{sign: summary.tokens(sign=sign) for sign in ("positive", "negative")},
        **{
            f"after_tool_{sign}": summary.tokens(sign=sign, is_first=True)
            for sign in ("positive", "negative")
        },
    }
    perplexities = (-summary.sequence_logprobs).exp().mean(0).tolist()
    metrics = {
        **ratio_quantiles(summary.sequence_log_ratios),
        **ratio_quantiles(summary.turn_log_ratios, "ratio/turn_p"),
        **_token_quantiles(tokens, PERCENTILES, "ratio/token_p"),
        "ratio/token_chi2": _chi2(tokens),
        "ratio/token_ess": _ess(tokens),
        "ratio/sequence_chi2": _exact_chi2(summary.sequence_log_ratios),
        "ratio/sequence_ess": _exact_ess(summary.sequence_log_ratios),
        "kl/rollout": -tokens.mean("log_ratio"),
        "kl/rollout_k3": tokens.mean("k3"),
        "perplexity/policy": perplexities[0],
        "perplexity/rollout": perplexities[1],
        "entropy/mean": tokens.mean("entropy"),
    }
    for name, chosen in slices.items():
        if chosen.num_tokens:
            metrics |= {f"{name}/{key}": value for key, value in _slice_metrics(chosen).items()}
    return metrics


def clean_metrics(summary: RatioSummary) -> dict[str, float]:
    """Describe the ratios of the policy without noise over the rollout policy.

    The metrics are those of `ratio_metrics` for all tokens, with `_clean` in the area, so that
    methods with and without noise can be compared. Where the clip window is the same, so is what
    `loss_clean/clip_fraction` counts: tokens that the surrogate would clip without noise.

    Args:
        summary: The ratios of the policy without noise.

    Returns:
        The metrics; empty if there were no tokens.
    """
    tokens = summary.tokens()
    if not tokens.num_tokens:
        return {}
    sides = tokens.clipped()
    return {
        **ratio_quantiles(summary.sequence_log_ratios, "ratio_clean/p"),
        **ratio_quantiles(summary.turn_log_ratios, "ratio_clean/turn_p"),
        **_token_quantiles(tokens, PERCENTILES, "ratio_clean/token_p"),
        "ratio_clean/token_chi2": _chi2(tokens),
        "ratio_clean/token_ess": _ess(tokens),
        "ratio_clean/sequence_chi2": _exact_chi2(summary.sequence_log_ratios),
        "ratio_clean/sequence_ess": _exact_ess(summary.sequence_log_ratios),
        "kl_clean/rollout": -tokens.mean("log_ratio"),
        "kl_clean/rollout_k3": tokens.mean("k3"),
        "entropy_clean/mean": tokens.mean("entropy"),
        "loss_clean/clip_fraction": sum(sides.values()),
        **{f"loss_clean/{name.replace('clip_', 'clip_fraction_')}": sides[name] for name in sides},
    }


def mismatch_metrics(summary: RatioSummary) -> dict[str, float]:
    """Describe the distance of the proximal policy from the rollout policy.

    With d = proximal - rollout logprob of a token and w = e^d: `mismatch/kl` = mean(-d),
    `mismatch/k3` = mean(w - d - 1), `mismatch/chi2` = mean(w^2) - 1, and the effective sample size
    `mismatch/ess` = mean(w)^2 / mean(w^2), a share. A perplexity is e^(-mean logprob) of a
    sequence, averaged over sequences.

    With stale rollouts the weights of the two policies differ, so this distance is the mismatch of
    trainer and engine only where the staleness is 0.

    Args:
        summary: The ratios of the proximal over the rollout policy.

    Returns:
        The metrics; empty if there were no tokens.
    """
    tokens = summary.tokens()
    if not tokens.num_tokens:
        return {}
    proximal, rollout = (-summary.sequence_logprobs).exp().mean(0).tolist()
    return {
        "mismatch/kl": -tokens.mean("log_ratio"),
        "mismatch/k3": tokens.mean("k3"),
        "mismatch/chi2": _chi2(tokens),
        "mismatch/ess": _ess(tokens),
        "mismatch/sequence_chi2": _exact_chi2(summary.sequence_log_ratios),
        "mismatch/sequence_ess": _exact_ess(summary.sequence_log_ratios),
        "mismatch/proximal_perplexity": proximal,
        "mismatch/rollout_perplexity": rollout,
        **ratio_quantiles(summary.sequence_log_ratios, "mismatch/p"),
        **_token_quantiles(tokens, PERCENTILES, "mismatch/token_p"),
    }


def lag_metrics(summary: RatioSummary) -> dict[str, float]:
    """Describe how far the policy has moved away from its versions that sampled.

    Args:
        summary: The ratios, by the trainer alone, of the policy at the start of the step over the
            version that sampled each token.

    Returns:
        `lag/kl`, `lag/k3` and `lag/ess` over tokens; empty if there are none.
    """
    tokens = summary.tokens()
    if not tokens.num_tokens:
        return {}
    return {
        "lag/kl": -tokens.mean("log_ratio"),
        "lag/k3": tokens.mean("k3"),
        "lag/ess": _ess(tokens),
    }


def sequence_ess(summary: RatioSummary) -> float:
    """Return the effective sample size of the sequence ratios, a share of their number."""
    return _exact_ess(summary.sequence_log_ratios)


def ratio_quantiles(log_ratios: Tensor, prefix: str = "ratio/p") -> dict[str, float]:
    """Return exact percentiles of ratios: P2, P98 and those between.

    Args:
        log_ratios: [S] log ratios, at least one, e.g. summed over each sequence.
        prefix: What precedes the percentile in each name.
    """
    ratios = _ratios(log_ratios).numpy()
    found = np.quantile(ratios, [percent / 100 for percent in PERCENTILES]).tolist()
    return {f"{prefix}{each}": value for each, value in zip(PERCENTILES, found, strict=True)}


def _slice_metrics(tokens: TokenSlice) -> dict[str, float]:
    return {
        "tokens": tokens.num_tokens,
        "kl": -tokens.mean("log_ratio"),
        "k3": tokens.mean("k3"),
        "chi2": _chi2(tokens),
        "ess": _ess(tokens),
        "log_perplexity": -tokens.mean("logprob"),
        "rollout_log_perplexity": -tokens.mean("rollout_logprob"),
        "entropy": tokens.mean("entropy"),
        **tokens.clipped(),
        **_token_quantiles(tokens, _ENVELOPE, "ratio_p"),
    }


def _token_quantiles(
    tokens: TokenSlice, percentiles: Sequence[int], prefix: str
) -> dict[str, float]:
    found = quantiles(tokens.histogram, [percent / 100 for percent in percentiles])
    return {f"{prefix}{p}": math.exp(value) for p, value in zip(percentiles, found, strict=True)}


def _chi2(tokens: TokenSlice) -> float:
    return tokens.mean("ratio_squared") - 1


def _ess(tokens: TokenSlice) -> float:
    return tokens.mean("ratio") ** 2 / tokens.mean("ratio_squared")


def _exact_chi2(log_ratios: Tensor) -> float:
    return float(_ratios(log_ratios).square().mean() - 1)


def _exact_ess(log_ratios: Tensor) -> float:
    ratios = _ratios(log_ratios)
    return float(ratios.mean().square() / ratios.square().mean())


def _ratios(log_ratios: Tensor) -> Tensor:
    return clamped_exp(log_ratios.double())
