"""The metrics of a run as curves, read again only when their file has grown."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tir_alp.records.folder import read_records

Curve = dict[str, list[Any]]


@dataclass(slots=True)
class Curves:
    """The metrics of one run.

    Args:
        file: Its `metrics.jsonl`.
    """

    file: Path
    _size: int = -1
    _found: dict[str, Curve] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Number of bytes of the file: where it differs, there is something new."""
        try:
            return self.file.stat().st_size
        except OSError:
            return 0

    def all(self) -> dict[str, Curve]:
        """Return each metric's steps and values; a value is None if it is not finite."""
        size = self.size
        if size != self._size:
            points: dict[str, dict[int, Any]] = {}
            for record in read_records(self.file)[0]:
                for name, value in record.items():
                    if name != "step" and type(value) in (int, float):
                        shown = value if math.isfinite(value) else None
                        points.setdefault(name, {})[record["step"]] = shown
            self._found = {
                name: {"steps": sorted(each), "values": [each[step] for step in sorted(each)]}
                for name, each in sorted(points.items())
            }
            self._size = size
        return self._found

    def some(self, names: Iterable[str]) -> dict[str, Curve]:
        """Return the metrics with these names that the run has."""
        found = self.all()
        return {name: found[name] for name in names if name in found}
