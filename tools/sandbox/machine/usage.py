"""What the kernel says about a process: its memory and its threads. Seen from outside, trusted."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from tir_alp.tools.sandbox.machine.control_groups import control_groups, number

_SIZE = 4096


class ProcessStatus:
    """Follows one process, from when it is made until `close`; keeps what it saw last.

    Raises:
        OSError: The process is gone already, or there are no descriptors left.
    """

    def __init__(self, pid: int) -> None:
        self.peak_memory_mb = self.memory_mb = 0.0
        """Modules that it shares with others included."""
        self.num_threads = 1
        self._since = time.monotonic()
        self._file = os.open(f"/proc/{pid}/status", os.O_RDONLY | os.O_CLOEXEC)
        self.measure()
        self._memory_mb_at_first = self.memory_mb

    def measure(self) -> None:
        """Look again; leaves everything as it is once the process is dead."""
        try:
            status = os.pread(self._file, _SIZE, 0)
        except OSError:
            return
        if b"VmHWM:" in status:
            self.peak_memory_mb = _number(status, b"VmHWM:") / 1024
            self.memory_mb = _number(status, b"VmRSS:") / 1024
            self.num_threads = _number(status, b"Threads:")

    @property
    def grown_mb(self) -> float:
        """The memory that it has taken since it was first seen."""
        return max(0.0, self.memory_mb - self._memory_mb_at_first)

    @property
    def age_s(self) -> float:
        """Seconds since it was first seen."""
        return time.monotonic() - self._since

    def close(self) -> None:
        """Give the descriptor back."""
        os.close(self._file)


def _number(status: bytes, field: bytes) -> int:
    return int(status.partition(field)[2].split(None, 1)[0])


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
