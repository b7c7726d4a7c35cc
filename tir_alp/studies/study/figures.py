"""Pictures from rows: the curves of each method, and its difference to the baseline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from tir_alp.studies.study.definition import StudyConfig
from tir_alp.studies.study.rows import Row
from tir_alp.studies.study.summary import difference, rows_of


def draw(config: StudyConfig, rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write the pictures, and return their files."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {"curves": _curves(config, rows), "differences": _differences(config, rows)}
    files = []
    for name, figure in drawn.items():
        files.append(folder / f"{name}.png")
        figure.savefig(files[-1], dpi=110, metadata={"Software": None})
    return files


def _colours(config: StudyConfig) -> dict[str, Any]:
    palette = colormaps["tab20"]
    return {name: palette(place % 20) for place, name in enumerate(config.methods)}


def _curves(config: StudyConfig, rows: Sequence[Row]) -> Figure:
    """One panel per setting, one line per run, in the colour of its method."""
    figure = Figure(figsize=(5 * len(config.settings), 4), layout="constrained")
    panels = figure.subplots(1, len(config.settings), sharey=True, squeeze=False)[0]
    for axes, setting in zip(panels, config.settings, strict=True):
        for method, colour in _colours(config).items():
            for place, row in enumerate(rows_of(rows, setting, method)):
                steps, values = zip(*row["curve"], strict=True)
                label = method if place == 0 else None
                axes.plot(steps, values, color=colour, alpha=0.6, linewidth=1, label=label)
        axes.axhline(config.measures.take_off, color="#999999", linewidth=0.8, linestyle=":")
        axes.set(title=setting, xlabel="step")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(f"{config.measures.metric}, mean over {config.measures.window} steps")
    panels[-1].legend(fontsize=7)
    return figure


def _differences(config: StudyConfig, rows: Sequence[Row]) -> Figure:
    """The mean difference of the level to the baseline, with its interval."""
    others = [name for name in config.methods if name != config.baseline]
    height = 1.2 + 0.3 * max(1, len(others))
    figure = Figure(figsize=(5 * len(config.settings), height), layout="constrained")
    panels = figure.subplots(1, len(config.settings), sharey=True, squeeze=False)[0]
    for axes, setting in zip(panels, config.settings, strict=True):
        baseline = rows_of(rows, setting, config.baseline)
        for place, method in enumerate(others):
            found = difference(rows_of(rows, setting, method), baseline, "level")
            if found is not None:
                axes.plot([found.low, found.high], [place, place], color="#0072B2")
                axes.plot([found.mean], [place], "o", color="#0072B2")
        axes.axvline(0, color="#999999", linewidth=0.8)
        axes.set(title=setting, xlabel=f"level, less that of {config.baseline}")
        axes.set_yticks(range(len(others)), others)
        axes.set_ylim(-0.6, max(1, len(others)) - 0.4)
        axes.invert_yaxis()
    return figure
