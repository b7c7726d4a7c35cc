"""A process that runs another library's environments, and the pipe to it.

The pipe carries JSON, one object a line, never a pickle: what a library says is data. Every
question has a deadline; a host that misses one is killed, and whoever else waits for it is told.

This module imports nothing of ours, since the OpenEnv server uses it from an interpreter that does
not have us.
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
_SEND_TIMEOUT = struct.pack("ll", 30, 0)  # seconds, microseconds: the host reads all the time
_LAST_WORDS_S = 5.0
"""How long a process that let go of its pipe may take to end by itself, and with its own status."""
_STDERR_CHARS = 2000


class HostError(Exception):
    """The host did not start, died, or was killed since it was late."""


class LibraryError(Exception):
    """The library raised; the host lives on."""


class HostProcess:
    """One process. Its methods block and may be called from any number of threads.

    Args:
        command: The interpreter, and its options if it has any.
        library: Module of `host/` that knows the library, e.g. "host_gem".
        start_timeout_s: Until the library has to be imported.

    Raises:
        HostError: It did not start, in the words of the part that failed.
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
        """Of the library."""

    @property
    def is_alive(self) -> bool:
        """Whether it can be asked."""
        with self._lock:
            return self._next_id > 0

    def ask(self, op: str, timeout_s: float, **arguments: Any) -> Any:
        """Have the host do one thing, and return what it says.

        Raises:
            HostError: It died, or said nothing in time and was killed.
            LibraryError: The library raised.
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
                except OSError:  # it is dead, or does not read; the reader tells everybody
                    self._end_processes()
        if number < 0:
            raise HostError(f"{self._name} has ended")
        return self._result(answer, timeout_s, f"gave no answer to {op!r}")

    def kill(self) -> None:
        """End the process and its children. Doing it twice is allowed."""
        self._end_processes()
        self._reader.join()
        atexit.unregister(self.kill)

    def _end_processes(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # the reader wakes, whoever else has the pipe

    def _result(self, answer: Future[Any], timeout_s: float, failure: str) -> Any:
        try:
            return answer.result(timeout_s)
        except FutureTimeout:
            self.kill()
            raise HostError(
                f"{self._name} {failure} within {timeout_s:g} s and was killed{self._said()}"
            ) from None

    def _read(self) -> None:
        """Hand each answer to whoever waits for it; in the end, tell all the others."""
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
            self._process.wait(_LAST_WORDS_S)
        self._end_processes()
        status = self._process.wait()
        with self._lock:
            self._next_id = -1
            left, self._waiting = self._waiting, {}
        for waiting in left.values():
            error = f"{self._name} ended with status {status}{self._said()}"
            waiting.set_exception(HostError(error))

    def _said(self) -> str:
        """The end of what it wrote to stderr."""
        size = os.fstat(self._stderr.fileno()).st_size
        start = max(0, size - _STDERR_CHARS)
        text = os.pread(self._stderr.fileno(), _STDERR_CHARS, start).decode(errors="replace")
        return f"; it said: {text.strip()}" if text.strip() else ""
