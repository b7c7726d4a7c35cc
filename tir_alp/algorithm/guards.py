"""Bounds on a run's health: what is out of bounds, and in which words it is told. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from tir_alp.config import GuardsConfig

_FAINT = 0.01


class Tripped(Exception):
    """A guard ended the run; says which bound was passed."""


def out_of_bounds(metrics: Mapping[str, float], guards: GuardsConfig) -> str:
    """Say which bound the metrics of a step pass; empty if none.

    A metric that is not there passes no bound, one that is NaN passes any.
    """
    if guards.max_kl is not None and "kl/rollout" in metrics:
        value = abs(metrics["kl/rollout"])
        if not value <= guards.max_kl:
            return f"|kl/rollout| is {value:.4g}, above guards.max_kl = {guards.max_kl:g}"
    if guards.max_ratio_spread is not None and "ratio/p98" in metrics:
        low, high = metrics["ratio/p2"], metrics["ratio/p98"]
        if not high <= guards.max_ratio_spread * low:
            return (
                f"sequence ratios reach from {low:.4g} (P2) to {high:.4g} (P98), further than a "
                f"factor of guards.max_ratio_spread = {guards.max_ratio_spread:g}"
            )
    return ""


def faint_noise(metrics: Mapping[str, float]) -> str:
    """Warn if rounding to the compute dtype swallows the noise; empty if it does not."""
    changed = metrics.get("alp/effective", 1.0)
    if changed >= _FAINT:
        return ""
    return (
        f"the noise changes {changed:.2%} of the elements it is added to: the rest is lost in "
        "rounding. ALP is nearly Bypass then; raise algorithm.perturbation.init_std"
    )
