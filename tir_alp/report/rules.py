"""What is marked in a panel: clip bounds, the bound of gradient norms, and events. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from tir_alp.report.catalogue import Panel
from tir_alp.report.read import RecordedRun

MOST_EVENTS = 50
"""Steps with an event that are marked, at most."""


def rules_of(run: RecordedRun, panel: Panel) -> Sequence[tuple[float, str]]:
    """Return where a panel of a run has a rule, and what it is."""
    if panel.unit == "norm":
        bound = run.settings.get("trainer.max_grad_norm")
        return [(float(bound), "bound")] if isinstance(bound, int | float) else []
    if panel.kind == "envelope" and panel.lines[0].metric == "ratio/p":
        return [(bound, "clip") for bound in _clip_window(run)]
    return []


def _clip_window(run: RecordedRun) -> list[float]:
    """Return the clip bounds of the sequence ratio to the rollout policy, if the loss has them."""
    settings = run.settings
    if settings.get("algorithm.ratio_level") != "sequence":
        return []
    if settings.get("algorithm.denominator") != "rollout":
        return []
    low, high = settings.get("algorithm.clip_low"), settings.get("algorithm.clip_high")
    if not isinstance(low, int | float) or not isinstance(high, int | float):
        return []
    return [bound for bound in (1 - low, 1 + high) if bound > 0]


def event_steps(run: RecordedRun) -> list[int]:
    """Return the steps of a run's events, each once; of very many, the latest."""
    return sorted({event["step"] for event in run.events})[-MOST_EVENTS:]
