"""One process at a time writes a run: a lock that the kernel frees when its holder dies."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path


class RunLock:
    """The lock of a run's folder, held from `acquire` to `release`.

    Args:
        path: The run's folder.
    """

    def __init__(self, path: Path) -> None:
        self._folder, self._file = path, path / "run.lock"
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the lock, and record who holds it.

        Raises:
            ValueError: Another process holds it; says which one, and since when.
        """
        descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise ValueError(self._held()) from None
        since = datetime.now(UTC).isoformat(timespec="seconds")
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": since}
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(holder).encode())
        self._descriptor = descriptor

    def check_is_free(self) -> None:
        """Raise ValueError if another process holds the lock, as `acquire` does."""
        if self._file.exists() and self._descriptor is None:
            self.acquire()
            self.release()

    def release(self) -> None:
        """Free the lock. The file stays: deleting it would let two processes hold a lock each."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _held(self) -> str:
        try:
            holder = json.loads(self._file.read_text())
            who = f"by process {holder['pid']} on {holder['host']}, since {holder['since']}"
        except (OSError, ValueError, KeyError, TypeError):
            who = "by another process"
        return (
            f"the run {self._folder} is being written {who}: wait until that ends, or stop it; "
            "reading it (report, audit) is possible at any time"
        )
