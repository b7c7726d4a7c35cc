"""Reads a run folder in any state: complete, still being written, or damaged."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tir_alp.records.folder import ADVICE, read_command, read_records, read_run_config
from tir_alp.records.provenance import PROVENANCE
from tir_alp.records.readable import redacted_values, secret_values
from tir_alp.run.describe import flat


@dataclass(frozen=True)
class Series:
    """The values of one metric by step."""

    steps: tuple[int, ...]
    """Strictly ascending."""
    values: tuple[float, ...]
    """One per step. NaN and infinities are kept, because they are informative."""

    @property
    def finite(self) -> list[float]:
        """The finite values."""
        return [value for value in self.values if math.isfinite(value)]

    def at(self) -> dict[int, float]:
        """Return a mapping from step to value."""
        return dict(zip(self.steps, self.values, strict=True))


@dataclass(frozen=True)
class RecordedRun:
    """The files of a run, except its trajectories and checkpoints."""

    path: Path
    command: str
    """The command that wrote it: `train` or `sft`."""
    config: Mapping[str, Any]
    """The nested config as it was saved."""
    objective: str
    """The objective as a formula; empty if it is missing."""
    series: Mapping[str, Series]
    """Series by metric name."""
    events: Sequence[Mapping[str, Any]]
    """Events with `step`, `kind` and `reason`, e.g. a guard that rolled the weights back."""
    environment: Sequence[Mapping[str, Any]]
    """The environment's report for each start of the run; may be empty."""
    advice: Sequence[Mapping[str, Any]]
    """What the run said about why it learns nothing: `step` and `advice`."""
    provenance: Mapping[str, Any]
    """Command, commit, versions, hardware and times; empty if the run recorded none."""
    last_written: float | None
    """When metrics were last written, in seconds since the epoch; None: never."""
    num_unreadable: int
    """Number of lines in `metrics.jsonl` that are not records, except an incomplete last one."""

    @property
    def name(self) -> str:
        """Name of the run folder."""
        return self.path.name

    @property
    def algorithm(self) -> str:
        """Name of the algorithm as configured."""
        if self.command != "train":
            return self.command
        section = self.config.get("algorithm")
        return str(section.get("name", "custom")) if isinstance(section, Mapping) else "custom"

    @property
    def seed(self) -> Any:
        """The config's seed, of whatever type."""
        return self.config.get("seed", 0)

    @property
    def last_step(self) -> int:
        """The last step with any metric; 0 if there is none."""
        return max((series.steps[-1] for series in self.series.values()), default=0)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The config as a flat mapping with dotted keys."""
        return flat(self.config)

    def finite(self, metric: str) -> list[float]:
        """The finite values of a metric; empty if the run lacks it."""
        return self.series[metric].finite if metric in self.series else []


def read_run(path: Path) -> RecordedRun:
    """Read a run, without the secrets in it. Raises ValueError if the path is not a run folder."""
    config = read_run_config(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not a run folder: {path / 'config.json'} is not an object")
    objective, file = path / "objective.txt", path / "metrics.jsonl"
    metrics, num_unreadable = read_records(file)
    texts = {
        "config": config,
        "objective": objective.read_text(errors="replace").strip() if objective.is_file() else "",
        "events": read_records(path / "events.jsonl")[0],
        "environment": read_records(path / "environment.jsonl")[0],
        "advice": read_records(path / ADVICE)[0],
        "provenance": _provenance(path / PROVENANCE),
    }
    return RecordedRun(
        path=path.resolve(),
        command=read_command(path),
        series=series_of(metrics),
        last_written=file.stat().st_mtime if metrics else None,
        num_unreadable=num_unreadable,
        **redacted_values(texts, secret_values(os.environ)),
    )


def _provenance(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def series_of(records: Sequence[Mapping[str, Any]]) -> dict[str, Series]:
    """Return the series of each metric.

    Values that are not numbers are left out. Of two values for one step, the later counts.

    Args:
        records: Metrics records, each with an int `step`.
    """
    found: dict[str, dict[int, float]] = {}
    for record in records:
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                found.setdefault(name, {})[record["step"]] = float(value)
    return {
        name: Series(*map(tuple, zip(*sorted(points.items()), strict=True)))
        for name, points in sorted(found.items())
    }
