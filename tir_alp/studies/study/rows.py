"""What a run came to, as one row: small enough for a repository, and equal if the run is repeated.

A row has no times and no paths. Take-off is told apart from stability: a run that never takes off
cannot collapse, and how high it is says nothing about how steadily it stays there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from tir_alp.report.compare import summary_of
from tir_alp.report.read import RecordedRun
from tir_alp.studies.study.definition import MeasuresConfig, Planned

Row = dict[str, Any]

_CURVE_POINTS = 25
_MEANS = {
    "ratio_clean_p98": "ratio_clean/p98",
    "ratio_clean_p2": "ratio_clean/p2",
    "entropy_clean": "entropy_clean/mean",
    "clip_clean": "loss_clean/clip_fraction",
    "mismatch": "mismatch/probe_mean",
    "staleness": "staleness/mean",
    "sigma": "alp/sigma_mean",
    "grad_norm": "grad_norm/policy",
}
"""Column -> metric whose mean over the steps is a column."""


def row_of(
    run: RecordedRun,
    planned: Planned,
    measures: MeasuresConfig,
    landscape: Mapping[str, Any] | None = None,
) -> Row:
    """Return the row of a run that has ended.

    Args:
        run: What the run has written.
        planned: What it was to be.
        measures: How it is judged.
        landscape: What `studies.landscape` found of its last policy; None: not measured.
    """
    series = run.series.get(measures.metric)
    if series is None:
        raise ValueError(f"{run.path} has no metric {measures.metric!r}")
    steps, values = list(series.steps), list(series.values)
    means = moving_means(values, measures.window)
    stopped = any(event["kind"] == "stop" for event in run.events)
    took_off = first_at_least(steps, means, measures.take_off)
    later = [value for step, value in zip(steps, values, strict=True) if step > measures.level_from]
    summary = summary_of(run)
    row = {
        "setting": planned.setting,
        "method": planned.method,
        "seed": planned.seed,
        "digest": planned.digest,
        "steps": run.last_step,
        "stopped": stopped,
        "took_off": took_off,
        "collapsed": None
        if took_off is None
        else collapse(steps, means, took_off, measures.collapse)
        or (run.last_step if stopped or run.last_step < planned.config.steps else None),
        "level": fmean(later) if later else math.nan,
        "accuracy_before": summary.before,
        "accuracy": summary.after,
        "widest_clean": summary.widest,
        "max_kl_clean": summary.max_kl,
        **{
            column: fmean(found) if found else math.nan
            for column, metric in _MEANS.items()
            for found in (run.series[metric].finite if metric in run.series else [],)
        },
        **(landscape_columns(landscape) if measures.landscape else {}),
        "curve": _curve(steps, means),
    }
    return {name: _rounded(value) for name, value in row.items()}


def landscape_columns(found: Mapping[str, Any] | None) -> Row:
    """Return the columns of a policy's landscape; NaN if it could not be measured."""
    sharp = (
        [] if found is None else [each["trace"] * each["rms"] ** 2 for each in found["sharpness"]]
    )
    moved = {} if found is None else {each["precision"]: each["mean"] for each in found["rounding"]}
    return {
        "sharpness": math.fsum(sharp) if sharp else math.nan,
        "sharpness_by_layer": sharp,
        **{f"rounding_{each}": moved.get(each, math.nan) for each in ("bfloat16", "int8")},
    }


def moving_means(values: Sequence[float], window: int) -> list[float]:
    """Return the mean of each value and those before it, up to `window` of them."""
    return [fmean(values[max(0, end - window) : end]) for end in range(1, len(values) + 1)]


def first_at_least(steps: Sequence[int], means: Sequence[float], level: float) -> int | None:
    """Return the first step at which a mean is at least `level`; None if there is none."""
    return next((step for step, mean in zip(steps, means, strict=True) if mean >= level), None)


def collapse(
    steps: Sequence[int], means: Sequence[float], took_off: int, share: float
) -> int | None:
    """Return the first step after the take-off with less than a share of the largest mean before.

    A mean that is not a number counts as less. None: there is no such step.
    """
    largest = -math.inf
    for step, mean in zip(steps, means, strict=True):
        if step >= took_off and largest > 0 and not mean >= share * largest:
            return step
        largest = max(largest, mean)
    return None


def read_rows(file: Path) -> list[Row]:
    """Read the rows of a file; none if it does not exist."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines() if line.strip()]


def write_rows(file: Path, rows: Iterable[Row]) -> None:
    """Write rows in the order of setting, method and seed, aside and then renamed."""
    ordered = sorted(rows, key=lambda row: (row["setting"], row["method"], row["seed"]))
    aside = file.with_name(f".{file.name}.part")
    aside.write_text("".join(f"{json.dumps(row)}\n" for row in ordered))
    aside.replace(file)


def _curve(steps: Sequence[int], means: Sequence[float]) -> list[list[float]]:
    """Return evenly spaced points of the moving mean, the last one among them."""
    every = max(1, math.ceil(len(steps) / _CURVE_POINTS))
    places = range(len(steps) - 1, -1, -every)
    return [[steps[place], means[place]] for place in reversed(places)]


def _rounded(value: Any) -> Any:
    """Six digits are enough; what is not a number is None, which JSON has."""
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
