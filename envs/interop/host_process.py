"""A process that runs another library's environments, and the pipe to it.

The pipe carries JSON, one object per line, and never a pickle: a library's messages are data. Every
request has a deadline. A host that misses one is killed, and all requests that wait for it fail.

This module imports nothing from tir_alp, because the OpenEnv server uses it in an interpreter that
does not have tir_alp.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from typing import Any

MAIN = Path(__file__).with_name("host") / "main.py"
_SEND_TIMEOUT = struct.pack("ll", 30, 0)  # seconds, microseconds: the host always reads
_EXIT_S = 5.0
"""Seconds that a process may take, after it closed its pipe, to exit with its own status."""
_STDERR_CHARS = 2000


class HostError(Exception):
    """The host did not start, died, or was killed because it missed a deadline."""


class LibraryError(Exception):
    """The library raised an exception; the host is still alive."""


class HostProcess:
    """A host process. Its methods block and may be called from any number of threads.

    Args:
        command: The interpreter, and any options for it.
        library: Module of `host/` that adapts the library, e.g. "host_gem".
        start_timeout_s: Seconds within which the process has to import the library.

    Raises:
        HostError: The process did not start; the message contains its own error output.
    """

    def __init__(self, command: Sequence[str], library: str, start_timeout_s: float) -> None:
        self._name = f"the process of {library} ({' '.join(command)})"
        self._lock = threading.Lock()
        self._waiting: dict[int, Future[Any]] = {}
        self._next_id = 1
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
        self._socket, theirs = socket.socketpair()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _SEND_TIMEOUT)
        started = self._waiting[0] = Future()
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [*command, str(MAIN), str(theirs.fileno()), library],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,  # libraries print
                    stderr=self._stderr,
                    start_new_session=True,
                )
            except OSError as error:
                self._socket.close()
                self._stderr.close()
                raise HostError(f"cannot start {self._name}: {error}") from error
        self._reader = threading.Thread(target=self._read, name="host", daemon=True)
        self._reader.start()
        atexit.register(self.kill)
        self.version: str = self._result(started, start_timeout_s, "did not start")
        """Version of the library."""

    @property
    def is_alive(self) -> bool:
        """Whether it can still take requests."""
        with self._lock:
            return self._next_id > 0

    def ask(self, op: str, timeout_s: float, **arguments: Any) -> Any:
        """Send one request to the host and return its answer.

        Args:
            op: Operation: "open", "reset", "step" or "close".
            timeout_s: Deadline in seconds.
            arguments: Arguments of the operation, which are sent as JSON.

        Raises:
            HostError: The host died, or missed the deadline and was killed.
            LibraryError: The library raised an exception.
        """
        answer: Future[Any] = Future()
        with self._lock:
            number = self._next_id
            if number > 0:
                self._waiting[number] = answer
                self._next_id += 1
                line = json.dumps({"id": number, "op": op, **arguments}) + "\n"
                try:
                    self._socket.sendall(line.encode())
                except OSError:  # it is dead or does not read; the reader fails all requests
                    self._end_processes()
        if number < 0:
            raise HostError(f"{self._name} has ended")
        return self._result(answer, timeout_s, f"gave no answer to {op!r}")

    def kill(self) -> None:
        """End the process and its children. Calling it twice is allowed."""
        self._end_processes()
        self._reader.join()
        atexit.unregister(self.kill)

    def _end_processes(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(OSError):
            self._socket.shutdown(
                socket.SHUT_RDWR
            )  # wakes the reader even if a child holds the pipe

    def _result(self, answer: Future[Any], timeout_s: float, failure: str) -> Any:
        try:
            return answer.result(timeout_s)
        except FutureTimeout:
            self.kill()
            raise HostError(
                f"{self._name} {failure} within {timeout_s:g} s and was killed"
                f"{self._error_output()}"
            ) from None

    def _read(self) -> None:
        """Pass each answer to the request that waits for it; at the end, fail the others."""
        with contextlib.suppress(OSError, ValueError), self._socket.makefile("rb") as lines:
            for line in lines:
                answer = json.loads(line)
                with self._lock:
                    waiting = self._waiting.pop(answer["id"])
                if "error" in answer:
                    waiting.set_exception(LibraryError(answer["error"]))
                else:
                    waiting.set_result(answer["result"])
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_EXIT_S)
        self._end_processes()
        status = self._process.wait()
        with self._lock:
            self._next_id = -1
            left, self._waiting = self._waiting, {}
        for waiting in left.values():
            error = f"{self._name} ended with status {status}{self._error_output()}"
            waiting.set_exception(HostError(error))

    def _error_output(self) -> str:
        """Return the end of what the process wrote to stderr, as part of a message."""
        size = os.fstat(self._stderr.fileno()).st_size
        start = max(0, size - _STDERR_CHARS)
        text = os.pread(self._stderr.fileno(), _STDERR_CHARS, start).decode(errors="replace")
        return f"; its error output: {text.strip()}" if text.strip() else ""
