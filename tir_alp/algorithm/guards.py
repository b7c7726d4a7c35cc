"""Guards: bounds on the health of a run, and the messages for what exceeds them. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from tir_alp.algorithm.section import Section

_FAINT = 0.01  # share of elements


class GuardsConfig(Section):
    """Bounds that a healthy run keeps. All are off unless set."""

    max_kl: float | None = Field(default=None, gt=0.0)
    """Bound of |kl/rollout|, in nats per token."""
    max_ratio_spread: float | None = Field(default=None, gt=1.0)
    """Bound of P98 over P2 of the sequence ratios."""
    on_trip: Literal["stop", "roll_back"] = "stop"
    """End the run, or load the weights, optimizer and sigma of the newest checkpoint and continue
    with new groups. `events.jsonl` in the run's folder records when and why."""
    max_roll_backs: int = Field(default=3, ge=1)
    """Number of roll-backs after which the next trip stops the run."""


class Tripped(Exception):
    """A guard ended the run; the message names the bound that was exceeded."""


def out_of_bounds(metrics: Mapping[str, float], guards: GuardsConfig) -> str:
    """Describe the bound that the metrics of a step exceed; empty if there is none.

    A missing metric exceeds no bound, and NaN exceeds every bound.
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
    """Return a warning if rounding to the compute dtype loses the noise; empty if it does not."""
    changed = metrics.get("alp/effective", 1.0)
    if changed >= _FAINT:
        return ""
    return (
        f"the noise changes {changed:.2%} of the elements it is added to: the rest is lost in "
        "rounding. ALP is nearly Bypass then; raise algorithm.perturbation.init_std"
    )
