"""Where the panels of a figure go: axes of one size, with room for what is written around them.

The room is computed from the number of lines and characters. Matplotlib can measure it instead, but
has to draw each figure twice more to do so, which was half of the time that a report took.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation

# Sizes in inches, except where a name says points.
_PANEL_WIDTH = 4.6
_PANELS_PER_ROW = 3
_AXES_HEIGHT = 2.5
_EDGE = 0.12  # above and below panels
_RIGHT = 0.3  # to the right of axes, for half of the last tick label
_TITLE_LINE = 0.2
_TICK_CHAR = 0.085  # of a tick label
_AXIS_LABEL = 0.36  # between the tick labels of the vertical axis and the edge of the panel
_BAR = 0.95  # a colour bar, with its tick labels and its label
_BELOW = 0.52  # below axes: tick labels and axis label
_LEGEND_LINE = 0.18
_LEGEND_POINTS = 8.5
_SHARED_LINE = 0.22
_SHARED_POINTS = 9.5
_CHARS_PER_INCH = 130.0  # of a legend's text of one point
_HANDLE = 0.067  # a line's sample and the space around it, per point of a legend's text
_MARKUP = re.compile(r"\$|\\mathdefault|[\\{}^]")


def canvas(num_panels: int) -> tuple[Figure, list[Axes]]:
    """Make a figure with axes for each panel, which `arrange` gives their places."""
    figure = Figure(dpi=110)
    FigureCanvasAgg(figure)
    return figure, [figure.add_axes((0, 0, 1, 1)) for _ in range(num_panels)]


def arrange(figure: Figure, all_axes: Sequence[Axes], shared: Iterable[Axes] = ()) -> None:
    """Give axes that have been drawn their places, row by row, and the figure its size.

    Args:
        figure: The figure.
        all_axes: Its axes, in the order in which they are read.
        shared: Axes whose lines one legend explains, below all others.
    """
    columns = min(len(all_axes), _PANELS_PER_ROW)
    rows = [all_axes[first : first + columns] for first in range(0, len(all_axes), columns)]
    panel_width = max(columns, 1.5) * _PANEL_WIDTH / columns
    left = [max(_left(each) for each in all_axes[column::columns]) for column in range(columns)]
    above = [_TITLE_LINE * max(_num_title_lines(each) for each in row) + _EDGE for row in rows]
    below = [
        _BELOW + _EDGE + _LEGEND_LINE * max(_num_legend_lines(each) for each in row) for row in rows
    ]
    width = columns * panel_width
    entries = _entries(shared)
    legend_columns = _columns([*entries], width, _SHARED_POINTS)
    strip = _SHARED_LINE * math.ceil(len(entries) / legend_columns) + _EDGE if entries else 0.0
    height = sum(above) + sum(below) + len(rows) * _AXES_HEIGHT + strip
    figure.set_size_inches(width, height)
    top = height
    for row, room_above, room_below in zip(rows, above, below, strict=True):
        bottom = top - room_above - _AXES_HEIGHT
        for column, axes in enumerate(row):
            start = column * panel_width + left[column]
            end = (column + 1) * panel_width - (_BAR if axes.child_axes else _RIGHT)
            axes.set_position(
                (start / width, bottom / height, (end - start) / width, _AXES_HEIGHT / height)
            )
        top = bottom - room_below
    if entries:
        figure.legend(
            [*entries.values()],
            [*entries],
            loc="lower left",
            bbox_to_anchor=(_EDGE / width, 0.0),
            ncols=legend_columns,
            fontsize=_SHARED_POINTS,
            frameon=False,
        )


def add_legend(axes: Axes) -> None:
    """Add a legend below the axes; a single line, which the title explains, needs none."""
    entries = _entries([axes])
    if len(entries) < 2 or (figure := axes.get_figure(root=True)) is None:
        return
    below = ScaledTranslation(0, -_BELOW, figure.dpi_scale_trans)
    axes.legend(
        [*entries.values()],
        [*entries],
        loc="upper left",
        bbox_to_anchor=(0.0, 0.0),
        bbox_transform=axes.transAxes + below,
        ncols=_panel_columns([*entries]),
        fontsize=_LEGEND_POINTS,
        frameon=False,
        borderaxespad=0.0,
    )


def add_bar_axes(axes: Axes) -> Axes:
    """Add axes for a colour bar to the right of others, for which `arrange` leaves room."""
    return axes.inset_axes((1.03, 0.0, 0.04, 1.0))


def _left(axes: Axes) -> float:
    """Room for the tick labels and the label of the vertical axis."""
    axis = axes.yaxis
    low, high = sorted(axis.get_view_interval())
    places = [each for each in axis.get_majorticklocs() if low <= each <= high]
    labels = axis.get_major_formatter().format_ticks(places)
    longest = max((len(_MARKUP.sub("", label)) for label in labels), default=1)
    return _AXIS_LABEL + _TICK_CHAR * longest


def _num_title_lines(axes: Axes) -> int:
    return axes.get_title(loc="left").count("\n") + 1


def _num_legend_lines(axes: Axes) -> int:
    if (legend := axes.get_legend()) is None:
        return 0
    labels = [text.get_text() for text in legend.get_texts()]
    return math.ceil(len(labels) / _panel_columns(labels))


def _panel_columns(labels: Sequence[str]) -> int:
    return min(2, _columns(labels, _PANEL_WIDTH - 1, _LEGEND_POINTS))


def _columns(labels: Sequence[str], width: float, points: float) -> int:
    """In how many columns labels fit into a legend of a width."""
    longest = max(map(len, labels), default=0) * points / _CHARS_PER_INCH + _HANDLE * points
    return max(1, min(len(labels), int(width / longest)))


def _entries(all_axes: Iterable[Axes]) -> dict[str, Any]:
    """What a legend of some axes explains, by label."""
    found: dict[str, Any] = {}
    for axes in all_axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return found
