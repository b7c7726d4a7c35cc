"""Records -> the numbers of the table that compares them. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import mean

from tir_alp.report.figures import spread
from tir_alp.report.methods import Method
from tir_alp.report.read import Record

_LAST_STEPS = 5


@dataclass(frozen=True)
class Numbers:
    """A run in few numbers; each is NaN where the run has no such metric."""

    reward: float
    """Mean of the last steps."""
    before: float
    after: float
    """Held-out accuracy, a share."""
    widest: float
    """P98 over P2 of the sequence ratios, at its widest."""
    max_kl: float
    """|KL| to the rollout policy, nats a token."""
    clip_fraction: float
    """Mean of all steps, a share."""


def numbers(record: Record) -> Numbers:
    """Sum a run up. Values that are not finite are left out; pictures show where they are."""
    accuracy, factor = record.series.get("eval/accuracy"), spread(record)
    return Numbers(
        reward=_mean(_values(record, "rollout/reward")[-_LAST_STEPS:]),
        before=accuracy.values[0] if accuracy and accuracy.steps[0] == 0 else math.nan,
        after=accuracy.values[-1] if accuracy and accuracy.steps[-1] > 0 else math.nan,
        widest=max(factor.finite, default=math.nan) if factor else math.nan,
        max_kl=max(map(abs, _values(record, "kl/rollout")), default=math.nan),
        clip_fraction=_mean(_values(record, "loss/clip_fraction")),
    )


COLUMNS = (
    "method",
    "seeds",
    "steps",
    f"reward, last {_LAST_STEPS} steps",
    "accuracy before",
    "accuracy after",
    "widest P98 / P2",
    "max |KL|, nats a token",
    "clip fraction, mean",
    "not finite",
    "events",
)


def row(method: Method) -> list[str]:
    """The cells of a method: means of its runs with their range, and the worst of tails and KL."""
    runs = [numbers(record) for record in method.records]
    return [
        method.label,
        method.seeds,
        _range(f"{record.last_step}" for record in method.records),
        _spread([run.reward for run in runs], ".3f"),
        _spread([run.before for run in runs], ".1%"),
        _spread([run.after for run in runs], ".1%"),
        _format(_worst(run.widest for run in runs), ".3g"),
        _format(_worst(run.max_kl for run in runs), ".2e"),
        _spread([run.clip_fraction for run in runs], ".2%"),
        str(sum(map(_num_not_finite, method.records))),
        str(sum(len(record.events) for record in method.records)),
    ]


def markdown(methods: Iterable[Method]) -> str:
    """The table as text, a line a method."""
    titles = [title.replace("|", r"\|") for title in COLUMNS]
    lines = [titles, ["---"] * len(titles), *map(row, methods)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _num_not_finite(record: Record) -> int:
    """Steps in which some metric was NaN or infinite."""
    return len(
        {
            step
            for series in record.series.values()
            for step, value in zip(series.steps, series.values, strict=True)
            if not math.isfinite(value)
        }
    )


def _values(record: Record, name: str) -> list[float]:
    return record.series[name].finite if name in record.series else []


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
    """The mean, and in brackets the least and the largest if there are several."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return "-"
    middle = format(mean(finite), form)
    if len(finite) == 1:
        return middle
    return f"{middle} ({format(min(finite), form)} to {format(max(finite), form)})"
