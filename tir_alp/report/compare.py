"""Summary numbers of runs, and the table that compares methods. Pure.

Tails, KL and clip fractions are those of the policy without noise, which all methods measure in the
same steps. Otherwise a method with noise would be charged for its own noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import mean

from tir_alp.report.figures import spread
from tir_alp.report.methods import Method
from tir_alp.report.read import RecordedRun

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
        reward=_mean(_values(run, "rollout/reward")[-_LAST_STEPS:]),
        before=accuracy.values[0] if accuracy and accuracy.steps[0] == 0 else math.nan,
        after=accuracy.values[-1] if accuracy and accuracy.steps[-1] > 0 else math.nan,
        widest=max(factor.finite, default=math.nan) if factor else math.nan,
        max_kl=max(map(abs, _values(run, "kl_clean/rollout")), default=math.nan),
        clip_fraction=_mean(_values(run, "loss_clean/clip_fraction")),
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
    """Return the cells of a method: means and ranges over its runs, but the worst tails and KL."""
    summaries = [summary_of(run) for run in method.runs]
    return [
        method.label,
        method.seeds,
        _range(f"{run.last_step}" for run in method.runs),
        _spread([each.reward for each in summaries], ".3f"),
        _spread([each.before for each in summaries], ".1%"),
        _spread([each.after for each in summaries], ".1%"),
        _format(_worst(each.widest for each in summaries), ".3g"),
        _format(_worst(each.max_kl for each in summaries), ".2e"),
        _spread([each.clip_fraction for each in summaries], ".2%"),
        str(sum(map(_num_not_finite, method.runs))),
        str(sum(len(run.events) for run in method.runs)),
    ]


def markdown(methods: Iterable[Method]) -> str:
    """Return the table as Markdown, one row per method."""
    titles = [title.replace("|", r"\|") for title in COLUMNS]
    lines = [titles, ["---"] * len(titles), *map(row, methods)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _num_not_finite(run: RecordedRun) -> int:
    """Return the number of steps in which some metric was NaN or infinite."""
    return len(
        {
            step
            for series in run.series.values()
            for step, value in zip(series.steps, series.values, strict=True)
            if not math.isfinite(value)
        }
    )


def _values(run: RecordedRun, name: str) -> list[float]:
    return run.series[name].finite if name in run.series else []


def _mean(values: list[float]) -> float:
    return mean(values) if values else math.nan


def _worst(values: Iterable[float]) -> float:
    return max((value for value in values if math.isfinite(value)), default=math.nan)


def _range(texts: Iterable[str]) -> str:
    found = [*dict.fromkeys(texts)]
    return ", ".join(found)


def _format(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "-"


def _spread(values: list[float], form: str) -> str:
    """Return the mean, followed by the smallest and the largest value if there are several."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return "-"
    middle = format(mean(finite), form)
    if len(finite) == 1:
        return middle
    return f"{middle} ({format(min(finite), form)} to {format(max(finite), form)})"
