"""What the kernel says about a process: its memory and its threads. Seen from outside, trusted."""

from __future__ import annotations

import os
import time

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
