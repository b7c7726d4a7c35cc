"""Runs -> matplotlib figures, by the object-oriented interface: no pyplot, no global state."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from tir_alp.report.catalogue import PICTURES, Panel, Picture
from tir_alp.report.layout import add_bar_axes, add_legend, arrange, canvas
from tir_alp.report.methods import Method, colour_of
from tir_alp.report.read import RecordedRun, Series
from tir_alp.report.rules import event_steps, rules_of
from tir_alp.report.series import (
    Compared,
    compared,
    envelope,
    lines_of,
    median_of,
    scale_for,
    spread,
)

_MANY = 8  # more lines than this get a colour bar instead of legend entries
_TITLE_WIDTH = 38  # characters
_SMALL, _LARGE = 1e-4, 1e5  # a linear axis up to values between them has ordinary decimals
_FEW_POINTS = 40  # lines with at most this many points have a dot at each
_BAND = {"alpha": 0.18, "linewidth": 0}
_SIDE_LINES = (
    ("#555555", (0, (5, 2))),
    ("#888888", (0, (1.5, 1.5))),
    ("#AAAAAA", "-"),
    ("#555555", (0, (6, 2, 1, 2))),
    ("#222222", (0, (1, 3))),
)
_ENVELOPES = (
    "P2 to P98 of the sequence ratios of a step, as the median over runs, and P98 divided by P2. "
    "In pictures, thin lines are runs."
)
_NOISY = (
    "Under ALP the ratios are those of the perturbed policy, so they contain the noise; those of "
    "the policy without noise follow."
)
_CLEAN = "All are of the policy without noise, by which methods are compared."


@dataclass(frozen=True)
class DrawnPicture:
    """A picture that has been drawn, with its caption."""

    name: str
    title: str
    caption: str
    figure: Figure


def pictures_of_run(run: RecordedRun) -> list[DrawnPicture]:
    """Draw each picture for which the run has metrics."""
    drawn = []
    for picture in PICTURES:
        panels = [panel for panel in picture.panels if lines_of(run, panel)]
        if not panels:
            continue
        figure, axes = canvas(len(panels))
        for panel, each in zip(panels, axes, strict=True):
            _draw_run(each, panel, run)
        arrange(figure, axes)
        drawn.append(DrawnPicture(picture.name, picture.title, picture.caption, figure))
    return drawn


def pictures_of_methods(methods: Sequence[Method]) -> list[DrawnPicture]:
    """Draw each picture for which any run has metrics: one line per run and one per method."""
    drawn = []
    for picture in PICTURES:
        if any(panel.kind == "envelope" for panel in picture.panels):
            figure = _envelopes(picture, methods)
            is_clean = picture.panels[0].lines[0].metric.startswith("ratio_clean")
            caption = f"{_ENVELOPES} {_CLEAN if is_clean else _NOISY}"
        else:
            figure = _comparison(picture, methods)
            caption = picture.caption
        if figure is not None:
            drawn.append(DrawnPicture(picture.name, picture.title, caption, figure))
    return drawn


# ------------------------------------------------------------------------------------- one run


def _draw_run(axes: Axes, panel: Panel, run: RecordedRun) -> None:
    lines, colour = lines_of(run, panel), colour_of(run.algorithm)
    if panel.kind == "envelope":
        _draw_band(axes, lines, colour)
    elif panel.kind in ("stack", "shares"):
        _draw_stack(axes, lines)
    else:
        _draw_lines(axes, lines, colour)
    _rule(axes, rules_of(run, panel))
    values = [value for series in lines.values() for value in series.finite]
    _finish(axes, panel, values, panel.title)
    for step in event_steps(run):
        axes.axvline(step, color="#B00000", linestyle=":", linewidth=1.2)
    add_legend(axes)


def _draw_lines(axes: Axes, lines: Mapping[str, Series], colour: str) -> None:
    """Draw lines: the first in the method's colour, layers in a colour scale, others in grey."""
    numbered = [label for label in lines if label.rpartition(" ")[2].isdigit()]
    layers = colormaps["viridis"](np.linspace(0, 0.92, max(2, len(numbered))))
    side = 0
    for number, (label, series) in enumerate(lines.items()):
        style: dict[str, Any] = {"color": colour, "linewidth": 2.0, "zorder": 3}
        if label in numbered:
            style = {"color": layers[numbered.index(label)], "linewidth": 1.3}
        elif number:
            shade, dash = _SIDE_LINES[side % len(_SIDE_LINES)]
            side += 1
            style = {"color": shade, "linestyle": dash, "linewidth": 1.6, "zorder": 4}
        in_bar = label in numbered and len(numbered) > _MANY
        _plot(axes, series, label=None if in_bar else label, **style)
    if len(numbered) > _MANY and axes.figure is not None:
        first, last = (int(label.rpartition(" ")[2]) for label in (numbered[0], numbered[-1]))
        bar = ScalarMappable(Normalize(first, last), colormaps["viridis"].resampled(256))
        axes.figure.colorbar(bar, cax=add_bar_axes(axes), label=numbered[0].rpartition(" ")[0])


def _draw_band(axes: Axes, lines: Mapping[str, Series], colour: str) -> None:
    for low, high in (("P2", "P98"), ("P5", "P95"), ("P25", "P75")):
        if low in lines and high in lines:
            below, above = lines[low], lines[high]
            edge = {"color": colour, "linewidth": 0.9, "alpha": 0.9}
            steps, bottom, top = _common(below, above)
            axes.fill_between(steps, bottom, top, color=colour, label=f"{low} to {high}", **_BAND)
            if low == "P2":
                _plot(axes, below, **edge)
                _plot(axes, above, **edge)
    if "P50" in lines:
        _plot(axes, lines["P50"], label="P50", color=colour, linewidth=2.0)
    axes.axhline(1.0, color="#999999", linewidth=0.8, zorder=0)


def _draw_stack(axes: Axes, lines: Mapping[str, Series]) -> None:
    steps = sorted(set().union(*(series.steps for series in lines.values())))
    rows = [[series.at().get(step, 0.0) for step in steps] for series in lines.values()]
    heights = np.nan_to_num(np.array(rows), nan=0.0, posinf=0.0, neginf=0.0)
    total = heights.sum()
    labels = [
        f"{label}, {100 * height.sum() / total:.3g} %" if total else label
        for label, height in zip(lines, heights, strict=True)
    ]
    if len(steps) == 1:  # an area would have no width
        steps, heights = [steps[0] - 0.4, steps[0] + 0.4], heights.repeat(2, axis=1)
    colours = colormaps["cividis"](np.linspace(0.25, 1, len(lines)))
    axes.stackplot(steps, heights, labels=labels, colors=colours, edgecolor="white", linewidth=0.3)
    axes.set_ylim(bottom=0)


def _rule(axes: Axes, rules: Sequence[tuple[float, str]]) -> None:
    """Draw horizontal lines that do not extend the axis."""
    axes.autoscale_view()
    bounds = " and ".join(f"{bound:g}" for bound, _ in rules)
    for number, (bound, name) in enumerate(rules):
        label = f"{name} {bounds}" if not number else None
        axes.axhline(bound, color="#333333", linestyle=":", linewidth=1.0, label=label)


# -------------------------------------------------------------------------------- several runs


def _comparison(picture: Picture, methods: Sequence[Method]) -> Figure | None:
    """Draw one panel per quantity that is compared; None if no run has any."""
    panels = compared(picture, methods)
    if not panels:
        return None
    figure, all_axes = canvas(len(panels))
    for each, axes in zip(panels, all_axes, strict=True):
        _draw_compared(axes, each, methods)
    arrange(figure, all_axes, shared=all_axes)
    return figure


def _draw_compared(axes: Axes, what: Compared, methods: Sequence[Method]) -> None:
    panel, line, title = what
    values: list[float] = []
    for method in methods:
        found = [lines_of(run, panel).get(line.label) for run in method.runs]
        series = [each for each in found if each is not None]
        values += [value for each in series for value in each.finite]
        _draw_method(axes, series, method)
    _finish(axes, panel, values, title)


def _draw_method(axes: Axes, series: Sequence[Series], method: Method) -> None:
    """Draw a thin line per run, and a thick one for their median."""
    if not series:
        return
    if len(series) > 1:
        for each in series:
            _plot(axes, each, color=method.colour, linewidth=0.8, alpha=0.5, marker=None)
    middle = median_of(series)
    style: dict[str, Any] = {"color": method.colour, "linestyle": method.dash, "linewidth": 2.0}
    style["marker"] = method.marker or ("o" if len(middle.steps) == 1 else "")
    if method.marker:
        style |= {"markersize": 5, "markevery": 0.12}
    _plot(axes, middle, label=method.label, **style)


def _envelopes(picture: Picture, methods: Sequence[Method]) -> Figure | None:
    """Draw one envelope per method, on equal vertical axes, all their widths, and other panels."""
    panel, others = picture.panels[0], compared(picture, methods)
    prefix = panel.lines[0].metric
    shown = [
        (method, found)
        for method in methods
        if (found := [bands for each in method.runs if (bands := envelope(each, prefix))])
    ]
    if not shown:
        return _comparison(picture, methods)
    figure, all_axes = canvas(len(shown) + 1 + len(others))
    width_axes = all_axes[len(shown)]
    values = [
        value
        for _, found in shown
        for bands in found
        for edge in ("P2", "P98")
        for value in bands[edge].finite
    ]
    widths: list[float] = []
    for (method, found), axes in zip(shown, all_axes, strict=False):
        for bands in found if len(found) > 1 else ():
            for edge in ("P2", "P98"):
                _plot(axes, bands[edge], color=method.colour, linewidth=0.7, alpha=0.6, marker=None)
        labels = [label for label in ("P2", "P50", "P98") if all(label in each for each in found)]
        middle = {label: median_of([bands[label] for bands in found]) for label in labels}
        _draw_band(axes, middle, method.colour)
        _finish(axes, panel, values, method.label)
        factors = [factor for each in method.runs if (factor := spread(each, prefix))]
        widths += [value for each in factors for value in each.finite]
        _draw_method(width_axes, factors, method)
    width = Panel("Width: P98 over P2", "factor", (), scale="log")
    _finish(width_axes, width, widths, width.title)
    for each, axes in zip(others, all_axes[len(shown) + 1 :], strict=True):
        _draw_compared(axes, each, methods)
    arrange(figure, all_axes, shared=all_axes[len(shown) :])
    return figure


# ------------------------------------------------------------------------------------- drawing


def _plot(axes: Axes, series: Series, *, label: str | None = None, **style: Any) -> None:
    """Draw a line; where a value is not finite, it has a gap and there is a cross at the bottom."""
    values = np.array(series.values, dtype=float)
    is_finite = np.isfinite(values)
    marker = {"marker": "o", "markersize": 3} if len(values) <= _FEW_POINTS else {}
    shown = np.where(is_finite, values, np.nan)
    name = None if label is None else plain(label)
    axes.plot(series.steps, shown, label=name, **marker | style)
    lost = np.array(series.steps)[~is_finite]
    if len(lost):
        bottom = np.zeros(len(lost))
        across = axes.get_xaxis_transform()
        axes.plot(
            lost, bottom, "x", color="#B00000", clip_on=False, transform=across, label="not finite"
        )


def _finish(axes: Axes, panel: Panel, values: Sequence[float], title: str) -> None:
    """Label and scale the axes.

    Args:
        axes: The axes.
        panel: The panel that is drawn in them.
        values: All finite values that are drawn.
        title: Title of the axes.
    """
    axes.set_title(
        "\n".join(textwrap.wrap(plain(title), _TITLE_WIDTH)),
        loc="left",
        y=1.0,  # where it would be anyway; without it, matplotlib measures what is above the axes
        fontsize=11,
        fontweight="bold",
    )
    axes.set_xlabel("step")
    axes.set_ylabel(panel.unit)
    axes.grid(True, color="#E3E3E3", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7, steps=[1, 2, 5, 10]))
    wanted = "log" if panel.kind == "envelope" else panel.scale
    scale = scale_for(values, wanted)
    if scale == "log":
        axes.set_yscale("log")
        axes.set_ylim(min(values) / 1.25, max(values) * 1.25)
        in_decades = max(values) > 100 * min(values)
        ticks = (1.0,) if in_decades else (1.0, 2.0, 5.0)
        axes.yaxis.set_major_locator(LogLocator(subs=ticks, numticks=9))
        axes.yaxis.set_major_formatter(FuncFormatter(_shortest))
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif scale == "symlog":
        near = min(abs(value) for value in values if value)
        threshold = max(near, max(map(abs, values)) / 1e4)
        axes.set_yscale("symlog", linthresh=threshold, linscale=0.4)
        axes.axhline(0.0, color="#999999", linewidth=0.8, zorder=0)
    elif panel.kind in ("stack", "shares"):
        axes.set_ylim(bottom=0)
    elif min(values, default=0.0) >= 0 and panel.scale != "auto":
        # A constant 0 is drawn at the bottom, and not in the middle of an axis around it.
        axes.set_ylim(0, 1.06 * max(values, default=0.0) or 1)
    largest = max(map(abs, values), default=0.0)
    if scale == "linear" and largest and not _SMALL <= largest < _LARGE:
        # And not a common power of ten above the axis.
        axes.yaxis.set_major_formatter(FuncFormatter(_shortest))
    elif scale == "linear":
        axes.ticklabel_format(axis="y", useOffset=False)


def _shortest(value: float, _: int | None) -> str:
    return f"{value:g}"


def _common(one: Series, other: Series) -> tuple[list[int], list[float], list[float]]:
    """Return the steps that two series share, and their values there, NaN if not finite."""
    first, second = one.at(), other.at()
    steps = [step for step in first if step in second]
    values = [[points[step] for step in steps] for points in (first, second)]
    bottom, top = ([v if math.isfinite(v) else math.nan for v in row] for row in values)
    return steps, bottom, top


def plain(text: str) -> str:
    """Escape text for matplotlib: no mathematics between dollars, no label hidden by `_`."""
    escaped = text.replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped
