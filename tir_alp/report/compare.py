"""Summary numbers of runs, and the rows of the table that compares methods. Pure.

Tails, KL and clip fractions are those of the policy without noise, which all methods measure in the
same steps. Otherwise a method with noise would be charged for its own noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean

from tir_alp.report.formats import with_interval
from tir_alp.report.intervals import mean_of
from tir_alp.report.methods import Method
from tir_alp.report.read import RecordedRun
from tir_alp.report.series import num_not_finite, spread

_LAST_STEPS = 5


@dataclass(frozen=True)
class RunSummary:
    """A run in a few numbers; each is NaN if the run lacks the metric."""

    reward: float
    """Mean over the last steps."""
    before: float
    """Held-out accuracy at step 0, a share."""
    after: float
    """Held-out accuracy at the last evaluation after step 0, a share."""
    widest: float
    """Largest P98 over P2 of the sequence ratios of any measured step, without noise."""
    max_kl: float
    """Largest |KL| to the rollout policy of any measured step, without noise, in nats per token."""
    clip_fraction: float
    """Mean over the measured steps, without noise, a share."""


def summary_of(run: RecordedRun) -> RunSummary:
    """Summarise a run, leaving out values that are not finite; the pictures show where they are."""
    accuracy, factor = run.series.get("eval/accuracy"), spread(run, "ratio_clean/p")
    return RunSummary(
        reward=_mean(run.finite("rollout/reward")[-_LAST_STEPS:]),
        before=accuracy.values[0] if accuracy and accuracy.steps[0] == 0 else math.nan,
        after=accuracy.values[-1] if accuracy and accuracy.steps[-1] > 0 else math.nan,
        widest=max(factor.finite, default=math.nan) if factor else math.nan,
        max_kl=max(map(abs, run.finite("kl_clean/rollout")), default=math.nan),
        clip_fraction=_mean(run.finite("loss_clean/clip_fraction")),
    )


COLUMNS = (
    "method",
    "seeds",
    "steps",
    f"reward, last {_LAST_STEPS} steps",
    "accuracy before",
    "accuracy after",
    "widest P98 / P2, without noise",
    "max |KL|, without noise, nats per token",
    "clip fraction, without noise, mean",
    "not finite",
    "events",
)


def row(method: Method) -> list[str]:
    """Return the cells of a method: means over seeds with intervals, but the worst tails and KL."""
    summaries = [summary_of(run) for run in method.runs]
    return [
        method.label,
        method.seeds,
        _range(f"{run.last_step}" for run in method.runs),
        _mean_cell([each.reward for each in summaries], ".3f"),
        _mean_cell([each.before for each in summaries], ".1%"),
        _mean_cell([each.after for each in summaries], ".1%"),
        _format(_worst(each.widest for each in summaries), ".3g"),
        _format(_worst(each.max_kl for each in summaries), ".2e"),
        _mean_cell([each.clip_fraction for each in summaries], ".2%"),
        str(sum(map(num_not_finite, method.runs))),
        str(sum(len(run.events) for run in method.runs)),
    ]


def _mean(values: list[float]) -> float:
    return fmean(values) if values else math.nan


def _worst(values: Iterable[float]) -> float:
    return max((value for value in values if math.isfinite(value)), default=math.nan)


def _range(texts: Iterable[str]) -> str:
    found = [*dict.fromkeys(texts)]
    return ", ".join(found)


def _format(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "-"


def _mean_cell(values: list[float], form: str) -> str:
    """Return the mean over seeds, followed by its interval if there are several."""
    return with_interval(mean_of([value for value in values if math.isfinite(value)]), form)
