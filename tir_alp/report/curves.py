"""Runs -> the curves that a page draws in place of its pictures, as JSON values. Pure.

A figure is a list of panels, and a panel has one list of steps for all of its lines. Of long runs,
the smallest and the largest value of each line in equal stretches of steps are kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tir_alp.report.catalogue import PICTURES, Panel, Picture
from tir_alp.report.methods import Method, colour_of
from tir_alp.report.read import RecordedRun, Series
from tir_alp.report.rules import event_steps, rules_of
from tir_alp.report.series import (
    band_of,
    compared,
    envelope,
    lines_of,
    median_of,
    scale_for,
    spread,
)

MOST_LINES = 40
"""Lines of a panel, at most; the picture has all."""
MOST_PANELS = 24
"""Panels of a figure, at most."""
_STRETCHES = 200  # over the lines of a panel
_LEAST_STRETCHES = 10
_MOST_LOST = 50
_DIGITS = 7
_SIDE = ("#5b6770", "#b07aa1", "#4e9a91", "#c98b2b", "#8d6e63")
_LAYERS = ("#440154", "#3b528b", "#21918c", "#5ec962", "#c8b020")
_AREAS = ("#31588f", "#7a8a4f", "#c9a227", "#b0563b", "#6f4e7c", "#3d8f8a", "#8a8a8a")

Curves = Mapping[str, list[dict[str, Any]]]
"""Panels by name of the picture."""


def curves_of_run(run: RecordedRun) -> Curves:
    """Return the curves of each picture for which the run has metrics."""
    events = event_steps(run)
    found = {}
    for picture in PICTURES:
        panels = [_panel_of_run(run, panel) for panel in picture.panels if lines_of(run, panel)]
        if panels:
            found[picture.name] = [{**panel, "events": events} for panel in panels]
    return found


def curves_of_methods(methods: Sequence[Method]) -> Curves:
    """Return the curves of each picture for which any run has metrics: one line per method.

    The line of several runs is their mean, in a band that is the 95 % interval over them.
    """
    found = {}
    for picture in PICTURES:
        panels = _compared(picture, methods)
        if picture.panels[0].kind == "envelope":
            panels = _envelopes(picture.panels[0], methods) + panels
        if panels:
            found[picture.name] = panels[:MOST_PANELS]
    return found


def _panel_of_run(run: RecordedRun, panel: Panel) -> dict[str, Any]:
    lines, colour = lines_of(run, panel), colour_of(run.algorithm)
    lines = dict([*lines.items()][:MOST_LINES])
    if panel.kind == "envelope":
        return _band(panel, lines, colour, panel.title, rules_of(run, panel))
    if panel.kind in ("stack", "shares"):
        return _stack(panel, lines)
    numbered = [label for label in lines if label.rpartition(" ")[2].isdigit()]
    side, drawn = iter(_SIDE * MOST_LINES), []
    for number, (label, series) in enumerate(lines.items()):
        shade = colour
        if label in numbered:
            place = numbered.index(label) / max(1, len(numbered) - 1)
            shade = _LAYERS[round(place * (len(_LAYERS) - 1))]
        elif number:
            shade = next(side)
        drawn.append(_line(label, series, shade))
    return _panel(panel, panel.title, drawn, rules=rules_of(run, panel))


def _band(
    panel: Panel,
    lines: Mapping[str, Series],
    colour: str,
    title: str,
    rules: Sequence[tuple[float, str]] = (),
) -> dict[str, Any]:
    """Return a panel of percentiles: each pair of them is a band."""
    order = [label for label in ("P98", "P2", "P95", "P5", "P75", "P25", "P50") if label in lines]
    drawn = [_line(label, lines[label], colour, 2.0 if label == "P50" else 0.7) for label in order]
    bands = [
        [order.index(high), order.index(low), colour]
        for low, high in (("P2", "P98"), ("P5", "P95"), ("P25", "P75"))
        if low in lines and high in lines
    ]
    return _panel(panel, title, drawn, bands=bands, rules=rules)


def _stack(panel: Panel, lines: Mapping[str, Series]) -> dict[str, Any]:
    """Return a panel in which each line is drawn above those before it."""
    steps = sorted(set().union(*(series.steps for series in lines.values())))
    below = dict.fromkeys(steps, 0.0)
    drawn = []
    for number, (label, series) in enumerate(lines.items()):
        own = {step: value if math.isfinite(value) else 0.0 for step, value in series.at().items()}
        below = {step: low + own.get(step, 0.0) for step, low in below.items()}
        top = Series(tuple(steps), tuple(below.values()))
        colour = _AREAS[number % len(_AREAS)]
        drawn.append(_line(label, top, colour, 1.0) | {"own": series, "fill": True})
    return _panel(panel, panel.title, drawn[::-1])  # a later area covers the lower part of a higher


def _compared(picture: Picture, methods: Sequence[Method]) -> list[dict[str, Any]]:
    panels = []
    for panel, line, title in compared(picture, methods):
        found = (
            [lines_of(run, panel).get(line.label) for run in method.runs] for method in methods
        )
        of_methods = [[each for each in series if each is not None] for series in found]
        panels.append(_of_methods(panel, title, methods, of_methods))
    return panels


def _envelopes(panel: Panel, methods: Sequence[Method]) -> list[dict[str, Any]]:
    prefix, panels = panel.lines[0].metric, []
    for method in methods[: MOST_PANELS - 1]:
        found = [bands for run in method.runs if (bands := envelope(run, prefix))]
        labels = [label for label in ("P2", "P50", "P98") if all(label in each for each in found)]
        if found:
            middle = {label: median_of([bands[label] for bands in found]) for label in labels}
            panels.append(_band(panel, middle, method.colour, method.label))
    if panels:
        of_methods = [
            [factor for run in method.runs if (factor := spread(run, prefix)) is not None]
            for method in methods
        ]
        width = Panel("Width: P98 over P2", "factor", (), scale="log")
        panels.append(_of_methods(width, width.title, methods, of_methods))
    return panels


def _of_methods(
    panel: Panel, title: str, methods: Sequence[Method], of_methods: Sequence[Sequence[Series]]
) -> dict[str, Any]:
    drawn, bands = [], []
    for method, found in zip(methods[:MOST_LINES], of_methods, strict=False):
        if not found:
            continue
        dash = [6, 4] if method.dash != "-" else []
        if len(found) == 1:
            drawn.append(_line(method.label, found[0], method.colour) | {"dash": dash})
            continue
        mean, low, high = band_of(found)
        label = f"{method.label}, mean of {len(found)}"
        drawn.append(_line(label, mean, method.colour) | {"dash": dash})
        edges = (_line("", edge, method.colour, 0.0) | {"edge": True} for edge in (high, low))
        drawn.extend(edges)
        bands.append([len(drawn) - 2, len(drawn) - 1, method.colour])
    return _panel(panel, title, drawn, bands=bands)


def _line(label: str, series: Series, colour: str, width: float = 1.8) -> dict[str, Any]:
    return {"label": label, "series": series, "colour": colour, "width": width}


def _panel(
    panel: Panel,
    title: str,
    lines: Sequence[dict[str, Any]],
    *,
    bands: Sequence[Sequence[Any]] = (),
    rules: Sequence[tuple[float, str]] = (),
) -> dict[str, Any]:
    """Return a panel as the page gets it."""
    all_series = [line["series"] for line in lines]
    steps = kept_steps(all_series)
    values = [value for series in all_series for value in series.finite]
    wanted = "log" if panel.kind == "envelope" else panel.scale
    own = [line.get("own", line["series"]) for line in lines if not line.get("edge")]
    lost = sorted({step for series in own for step in _lost(series)})
    return {
        "title": title,
        "unit": panel.unit,
        "log": scale_for(values, wanted) == "log",
        "from_zero": panel.kind in ("stack", "shares")
        or (panel.scale != "auto" and min(values, default=-1.0) >= 0),
        "steps": steps,
        "lines": [
            {
                **{name: line[name] for name in line if name not in ("series", "own")},
                "values": _values(line["series"], steps),
                **({"own": _values(line["own"], steps)} if "own" in line else {}),
            }
            for line in lines
        ],
        "bands": [list(each) for each in bands],
        "rules": [list(each) for each in rules],
        "lost": lost[:_MOST_LOST],
        "all_steps": len(set().union(*(series.steps for series in all_series))),
    }


def kept_steps(lines: Sequence[Series]) -> list[int]:
    """Return the steps that are drawn: all of a short run, and the extremes of a long one."""
    every = sorted(set().union(*(series.steps for series in lines)))
    stretches = max(_LEAST_STRETCHES, _STRETCHES // max(1, len(lines)))
    if len(every) <= 2 * stretches:
        return every
    size = math.ceil(len(every) / stretches)
    kept = {every[0], every[-1]}
    for series in lines:
        points = series.at()
        for start in range(0, len(every), size):
            there = [
                s for s in every[start : start + size] if math.isfinite(points.get(s, math.nan))
            ]
            if there:
                kept |= {min(there, key=points.__getitem__), max(there, key=points.__getitem__)}
    return sorted(kept)


def _values(series: Series, steps: Iterable[int]) -> list[float | None]:
    points = series.at()
    found = (points.get(step, math.nan) for step in steps)
    return [float(f"{each:.{_DIGITS}g}") if math.isfinite(each) else None for each in found]


def _lost(series: Series) -> list[int]:
    pairs = zip(series.steps, series.values, strict=True)
    return [step for step, value in pairs if not math.isfinite(value)]
