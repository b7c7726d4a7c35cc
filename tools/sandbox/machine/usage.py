"""What processes and containers use of the machine, seen from outside and by the kernel's word.

`ProcessUsage` follows one process (its memory and its threads); `ContainerUsage` follows the
control groups of a container (its memory and its processor time). Both keep the last values that
they saw, so that these can be read after the end.
"""

from __future__ import annotations

import abc
import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from tir_alp.tools.sandbox.jail.limit_files import LIMIT_FILES, read_number
from tir_alp.tools.sandbox.machine.control_groups import control_groups

_STATUS_BYTES = 4096
_NANOSECONDS, _MICROSECONDS = 1e9, 1e6


class _Usage(abc.ABC):
    """Memory in MB, now, at most, and since the first measurement."""

    def __init__(self) -> None:
        self.memory_mb = self.peak_memory_mb = 0.0
        self._since = time.monotonic()
        self.measure()
        self._first_memory_mb = self.memory_mb

    @abc.abstractmethod
    def measure(self) -> None:
        """Update the values; changes nothing once the process or the container is gone."""

    @property
    def grown_mb(self) -> float:
        """Memory taken since the first measurement."""
        return max(0.0, self.memory_mb - self._first_memory_mb)

    @property
    def age_s(self) -> float:
        """Seconds since the first measurement."""
        return time.monotonic() - self._since


class ProcessUsage(_Usage):
    """Follows one process until `close`. Modules that it shares with others count as its memory.

    Raises:
        OSError: The process has ended already, or there are no descriptors left.
    """

    def __init__(self, pid: int) -> None:
        self.num_threads = 1
        self._file = os.open(f"/proc/{pid}/status", os.O_RDONLY | os.O_CLOEXEC)
        super().__init__()

    def measure(self) -> None:
        """See `_Usage`."""
        try:
            status = os.pread(self._file, _STATUS_BYTES, 0)
        except OSError:
            return
        if b"VmHWM:" in status:
            self.peak_memory_mb = _number(status, b"VmHWM:") / 1024
            self.memory_mb = _number(status, b"VmRSS:") / 1024
            self.num_threads = _number(status, b"Threads:")

    def close(self) -> None:
        """Give the descriptor back."""
        os.close(self._file)


class ContainerUsage(_Usage):
    """Follows the innermost control groups of a container's process."""

    def __init__(self, pid: int) -> None:
        self.cpu_s = 0.0
        self._folders: dict[str, Path] = {}
        for controller in ("cpuacct", "memory", "pids"):
            with contextlib.suppress(OSError, StopIteration):
                self._folders[controller] = next(control_groups(controller, pid))
        super().__init__()

    def unlimited(self) -> Iterator[str]:
        """The resources that this container may use without a bound."""
        for resource, (controller, *files) in LIMIT_FILES.items():
            if self._read(controller, *files) is None:
                yield resource

    def measure(self) -> None:
        """See `_Usage`."""
        self.cpu_s = max(self.cpu_s, self._cpu_s())
        used = self._read("memory", "memory.current", "memory.usage_in_bytes")
        if used is not None:
            self.memory_mb = used / 2**20
            peak = self._read("memory", "memory.peak", "memory.max_usage_in_bytes")
            self.peak_memory_mb = max(self.peak_memory_mb, self.memory_mb, (peak or 0) / 2**20)

    def _cpu_s(self) -> float:
        if (used := self._read("cpuacct", "cpuacct.usage")) is not None:
            return used / _NANOSECONDS
        with contextlib.suppress(OSError, KeyError):
            lines = (self._folders["cpuacct"] / "cpu.stat").read_text().splitlines()
            return int(dict(map(str.split, lines))["usage_usec"]) / _MICROSECONDS
        return 0.0

    def _read(self, controller: str, *files: str) -> int | None:
        folder = self._folders.get(controller)
        return None if folder is None else read_number(folder, *files)


def _number(status: bytes, field: bytes) -> int:
    return int(status.partition(field)[2].split(None, 1)[0])
