"""What a container has used, and may use, as the host's kernel counts it in its control groups."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from tir_alp.tools.sandbox.control_groups import control_groups, number

_NANOSECONDS, _MICROSECONDS = 1e9, 1e6
_LIMITS = {
    "memory": ("memory", "memory.max", "memory.limit_in_bytes"),
    "processes": ("pids", "pids.max"),
}


class ContainerUse:
    """Follows the innermost control groups of a process; keeps what it saw last."""

    def __init__(self, pid: int) -> None:
        self._folders: dict[str, Path] = {}
        for controller in ("cpuacct", "memory", "pids"):
            with contextlib.suppress(OSError, StopIteration):
                self._folders[controller] = next(control_groups(controller, pid))
        self.cpu_s = self.memory_mb = self.peak_memory_mb = 0.0
        self._since = time.monotonic()
        self.measure()
        self._memory_mb_at_first = self.memory_mb

    def unlimited(self) -> Iterator[str]:
        """What this container may take without a bound."""
        for what, (controller, *files) in _LIMITS.items():
            if self._read(controller, *files) is None:
                yield what

    def measure(self) -> None:
        """Look again; leaves everything as it is once the container is gone."""
        self.cpu_s = max(self.cpu_s, self._cpu_s())
        used = self._read("memory", "memory.current", "memory.usage_in_bytes")
        if used is not None:
            self.memory_mb = used / 2**20
            peak = self._read("memory", "memory.peak", "memory.max_usage_in_bytes")
            self.peak_memory_mb = max(self.peak_memory_mb, self.memory_mb, (peak or 0) / 2**20)

    @property
    def grown_mb(self) -> float:
        """The memory that it has taken since it was first seen."""
        return max(0.0, self.memory_mb - self._memory_mb_at_first)

    @property
    def age_s(self) -> float:
        """Seconds since it was first seen."""
        return time.monotonic() - self._since

    def _cpu_s(self) -> float:
        if (used := self._read("cpuacct", "cpuacct.usage")) is not None:
            return used / _NANOSECONDS
        with contextlib.suppress(OSError, KeyError):
            lines = (self._folders["cpuacct"] / "cpu.stat").read_text().splitlines()
            return int(dict(map(str.split, lines))["usage_usec"]) / _MICROSECONDS
        return 0.0

    def _read(self, controller: str, *files: str) -> int | None:
        folder = self._folders.get(controller)
        return None if folder is None else number(folder, *files)
