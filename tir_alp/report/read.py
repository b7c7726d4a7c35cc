"""Reads the folder of a run as it is: whole, still being written, or torn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tir_alp.algorithm.presets import ALGORITHMS
from tir_alp.config import Config
from tir_alp.records.folder import read_records, read_run_config


@dataclass(frozen=True)
class Series:
    """One metric over the steps."""

    steps: tuple[int, ...]
    """Ascending, each once."""
    values: tuple[float, ...]
    """NaN and infinities are kept: they are news."""

    @property
    def finite(self) -> list[float]:
        """Values that can be compared."""
        return [value for value in self.values if math.isfinite(value)]

    def at(self) -> dict[int, float]:
        """Step -> value."""
        return dict(zip(self.steps, self.values, strict=True))


@dataclass(frozen=True)
class Record:
    """What a run left behind, but for its trajectories and checkpoints."""

    path: Path
    config: Mapping[str, Any]
    """As it was saved, nested."""
    objective: str
    """Empty if it is not there."""
    series: Mapping[str, Series]
    """By metric."""
    events: Sequence[Mapping[str, Any]]
    """Each with `step`, `kind` and `reason`, e.g. a guard that rolled the weights back."""
    environment: Sequence[Mapping[str, Any]]
    """What the environment ran in, a mapping for each start of the run; may be empty."""
    num_unreadable: int
    """Lines inside `metrics.jsonl` that are no rows; a torn last one is not counted."""

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.name

    @property
    def algorithm(self) -> str:
        """The method's name, as it was configured."""
        section = self.config.get("algorithm")
        return str(section.get("name", "custom")) if isinstance(section, Mapping) else "custom"

    @property
    def seed(self) -> Any:
        """Of the run; whatever the config has there."""
        return self.config.get("seed", 0)

    @property
    def last_step(self) -> int:
        """The highest step that any metric has; 0 if there is none."""
        return max((series.steps[-1] for series in self.series.values()), default=0)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The config with dotted keys."""
        return flat(self.config)


def read_run(path: Path) -> Record:
    """Read a run. Raises ValueError if the folder is none of a run."""
    config = read_run_config(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not a run folder: {path / 'config.json'} holds no table")
    objective = path / "objective.txt"
    rows, num_unreadable = read_records(path / "metrics.jsonl")
    return Record(
        path=path.resolve(),
        config=config,
        objective=objective.read_text().strip() if objective.is_file() else "",
        series=series_of(rows),
        events=read_records(path / "events.jsonl")[0],
        environment=read_records(path / "environment.jsonl")[0],
        num_unreadable=num_unreadable,
    )


def series_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Series]:
    """Sort rows by metric; what is no number is left out, of two values at a step the later stays.

    Args:
        rows: Each with an int `step`.
    """
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                found.setdefault(name, {})[row["step"]] = float(value)
    return {
        name: Series(*map(tuple, zip(*sorted(points.items()), strict=True)))
        for name, points in sorted(found.items())
    }


def changed_settings(record: Record) -> dict[str, tuple[Any, Any]]:
    """What the run's config has that the defaults have not: dotted key -> its value, the default.

    The defaults of an algorithm are those of the preset that it names. A key that this version does
    not know has the default None.
    """
    preset = ALGORITHMS.get(record.algorithm)
    defaults = Config() if preset is None else Config(algorithm=preset)
    known = flat(defaults.model_dump(mode="json"))
    return {
        key: (value, known.get(key))
        for key, value in record.settings.items()
        if key not in known or known[key] != value
    }


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Write nested mappings with dotted keys; an empty one vanishes."""
    found = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
