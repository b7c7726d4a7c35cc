"""The lines that a run's panels have, and what is computed from series. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median

from tir_alp.report.catalogue import PERCENTILES, Line, Panel, Picture, matching
from tir_alp.report.intervals import mean_of
from tir_alp.report.methods import Method
from tir_alp.report.read import RecordedRun, Series

_SPREAD = 30.0  # values that differ by more than this factor are drawn on a log axis


def lines_of(run: RecordedRun, panel: Panel) -> dict[str, Series]:
    """Return the lines of a panel that the run has, by label, in order and in the panel's unit."""
    if panel.kind == "envelope":
        return envelope(run, panel.lines[0].metric)
    found: dict[str, Series] = {}
    for line in panel.lines:
        for metric in matching(line.metric, run.series):
            rest = metric.removeprefix(line.metric.removesuffix("*"))
            label = f"{line.label} {rest}" if "*" in line.metric else line.label
            found[label] = run.series[metric]
    if panel.kind == "shares":
        found = shares(found)
    if panel.unit == "%":
        found = {
            label: Series(series.steps, tuple(100 * value for value in series.values))
            for label, series in found.items()
        }
    return found


Compared = tuple[Panel, Line, str]
"""A panel, its line that is compared, and the title of what is drawn."""


def compared(picture: Picture, methods: Sequence[Method]) -> list[Compared]:
    """Return the quantities of a picture that runs are compared by, if any run has them.

    Envelopes are not among them: each method has its own.
    """
    runs = [run for method in methods for run in method.runs]
    found = []
    for panel in picture.panels:
        for line in () if panel.kind == "envelope" else panel.lines[: panel.compared]:
            title = panel.title if len(panel.lines) == 1 else f"{panel.title}: {line.label}"
            if any(line.label in lines_of(run, panel) for run in runs):
                found.append((panel, line, title))
    return found


def envelope(run: RecordedRun, prefix: str) -> dict[str, Series]:
    """Return the percentiles that the run has, by label; empty without P2 and P98.

    Args:
        run: The run.
        prefix: Start of the metrics' names, e.g. "ratio/p".
    """
    names = {f"P{each}": f"{prefix}{each}" for each in PERCENTILES}
    if not run.series.keys() >= {names["P2"], names["P98"]}:
        return {}
    return {label: run.series[name] for label, name in names.items() if name in run.series}


def shares(counts: Mapping[str, Series]) -> dict[str, Series]:
    """Divide by the sum at each step; a series that is always 0 is left out."""
    points = {label: series.at() for label, series in counts.items()}
    steps = sorted(set().union(*points.values()))
    sums = {step: sum(each.get(step, 0.0) for each in points.values()) for step in steps}
    steps = [step for step in steps if sums[step] > 0]
    return {
        label: Series(tuple(steps), tuple(each.get(step, 0.0) / sums[step] for step in steps))
        for label, each in points.items()
        if any(each.get(step, 0.0) for step in steps)
    }


def spread(run: RecordedRun, prefix: str) -> Series | None:
    """Return P98 over P2 of ratios, given by what precedes "P98"; None if the run lacks them."""
    found = envelope(run, prefix)
    if not found:
        return None
    low, high = found["P2"].at(), found["P98"].at()
    steps = [step for step in high if step in low]
    values = (high[step] / low[step] if low[step] else math.inf for step in steps)
    return Series(tuple(steps), tuple(values))


def median_of(series: Sequence[Series]) -> Series:
    """Return the median of several runs, at the steps that at least half of them have."""
    points = [each.at() for each in series]
    steps = [
        step
        for step in sorted(set().union(*points))
        if 2 * sum(step in each for each in points) >= len(points)
    ]
    found = ([each[step] for each in points if step in each] for step in steps)
    # A value that is not a number has no place in an order.
    medians = (math.nan if any(map(math.isnan, each)) else median(each) for each in found)
    return Series(tuple(steps), tuple(medians))


def band_of(series: Sequence[Series]) -> tuple[Series, Series, Series]:
    """Return mean, low and high of the 95 % interval of several runs, at the steps of all.

    Values that are not finite are left out; where fewer than two are left, the ends are NaN.
    """
    points = [each.at() for each in series]
    steps = tuple(sorted(set().union(*points)))
    found = [
        mean_of([each[step] for each in points if math.isfinite(each.get(step, math.nan))])
        for step in steps
    ]
    columns = zip(*((each.mean, each.low, each.high) for each in found), strict=True)
    mean, low, high = columns if found else ((), (), ())
    return Series(steps, tuple(mean)), Series(steps, tuple(low)), Series(steps, tuple(high))


def num_not_finite(run: RecordedRun) -> int:
    """Return the number of steps in which some metric was NaN or infinite."""
    return len(
        {
            step
            for series in run.series.values()
            for step, value in zip(series.steps, series.values, strict=True)
            if not math.isfinite(value)
        }
    )


def scale_for(values: Sequence[float], wanted: str) -> str:
    """Return the scale of an axis: the wanted one, if the values allow it.

    A log axis needs positive values. With `auto` they must also differ by orders of magnitude;
    values of both signs then get a log axis that is linear around 0.
    """
    sizes = [abs(value) for value in values if value]
    if wanted == "linear" or not sizes:
        return "linear"
    if min(values) > 0 and (wanted == "log" or max(sizes) > _SPREAD * min(sizes)):
        return "log"
    return "linear" if max(sizes) <= _SPREAD * median(sizes) else "symlog"
