"""A server's process: how it is started, how its progress is reported, and how it is ended.

A server is a session of processes of its own. The kernel kills it when the process that started it
ends, for whatever reason (`lifetime.die_with_parent`), and `kill` ends the whole session.

Python's resource trackers are exempt from both. Each knows the shared memory and semaphores that
the processes of its server have made, removes them when the last of those processes has ended, and
then ends itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
import signal
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tir_alp.engines.base import EngineFailed, Log
from tir_alp.engines.servers.http_client import ServerClient
from tir_alp.engines.servers.lifetime import PARENT_VARIABLE

_POLL_S = 0.5
_LOG_EVERY_S = 10.0
_END_S = 60.0
_TIDY_S = 10.0  # part of it, in which resource trackers remove what the others have left
_TIDY_POLL_S = 0.05
_PORTS = range(20000, 32768)  # Linux gives those above to connections
_TRACKER = b"multiprocessing.resource_tracker"
_TAIL_LINES, _LINE_LENGTH = 25, 300  # one line has all of the server's settings


class ServerProcess:
    """One server that the run starts and ends.

    Args:
        name: Name for messages.
        command: Program and arguments.
        environment: Variables added to those of this process.
        log_path: File for what it prints.
        log: Receives its progress.
        stages: Lines of its log, in order, each with what it does from there on; the line "" stands
            for the start.
        leaves: Prefix of the files in /dev/shm that it leaves when it is killed. Those that it had
            mapped are removed by `kill`. "": it leaves none.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        log_path: Path,
        log: Log,
        stages: Sequence[tuple[str, str]],
        leaves: str = "",
    ) -> None:
        self.name = name
        self.log_path = log_path
        self._command, self._environment = command, environment
        self._log, self._stages, self._leaves = log, stages, leaves
        self._left: set[Path] = set()
        self._process: asyncio.subprocess.Process | None = None
        self._log_start = 0

    @property
    def pid(self) -> int | None:
        """Id of the server's first process, which is also the id of its session."""
        return self._process.pid if self._process is not None else None

    async def start(self, *arguments: str) -> None:
        """Start the process, with more arguments for its command line."""
        with self.log_path.open("ab") as log:
            self._log_start = log.tell()
            self._process = await asyncio.create_subprocess_exec(
                *(*self._command, *arguments),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self._environment, PARENT_VARIABLE: str(os.getpid())},
                start_new_session=True,
            )

    async def wait_until_ready(self, client: ServerClient, timeout_s: float) -> None:
        """Wait until the server answers, and log its progress.

        Raises:
            EngineFailed: If it ends or is not ready in time; the message has the end of its log.
        """
        assert self._process is not None
        began = logged = time.monotonic()
        stage = ""
        while not await client.is_healthy():
            now = time.monotonic()
            if self._process.returncode is not None:
                raise EngineFailed(f"{self.name} ended while it started:\n{self.tail()}")
            if now - began > timeout_s:
                raise EngineFailed(
                    f"{self.name} was not ready within engine.start_timeout_s = {timeout_s:g} s:\n"
                    f"{self.tail()}"
                )
            if (reached := self._stage()) != stage or now - logged > _LOG_EVERY_S:
                stage, logged = reached, now
                self._log(f"{self.name}: {stage} ({now - began:.0f} s)")
            await asyncio.sleep(_POLL_S)
        self._note_shared_memory(_members(self._process.pid))
        self._log(f"{self.name}: ready after {time.monotonic() - began:.0f} s")

    async def ended(self) -> int:
        """Wait until the process ends; returns its exit code."""
        assert self._process is not None
        return await self._process.wait()

    async def kill(self) -> None:
        """End every process of the server, even a stopped one.

        Raises:
            EngineFailed: If the kernel has not ended it within a minute.
        """
        if self._process is None:
            return
        session = self._process.pid
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_TIDY_S):
                while members := _members(session):
                    self._note_shared_memory(members)
                    for pid, is_tracker in members.items():
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGCONT if is_tracker else signal.SIGKILL)
                    await asyncio.sleep(_TIDY_POLL_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(session, signal.SIGKILL)
        try:
            async with asyncio.timeout(_END_S):
                await self._process.wait()
        except TimeoutError:
            raise EngineFailed(f"{self.name} has not ended {_END_S:g} s after SIGKILL") from None
        while self._left:
            self._left.pop().unlink(missing_ok=True)

    def tail(self) -> str:
        """The last lines that it has printed since its start."""
        lines = self._printed().splitlines()[-_TAIL_LINES:]
        return "\n".join(line[:_LINE_LENGTH] for line in lines)

    def _printed(self) -> str:
        with self.log_path.open("rb") as log:
            log.seek(self._log_start)
            return log.read().decode(errors="replace")

    def _note_shared_memory(self, pids: Iterable[int]) -> None:
        for pid in pids if self._leaves else ():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                    if (path := line.partition("/")[2]).startswith(f"dev/shm/{self._leaves}"):
                        self._left.add(Path("/", path))

    def _stage(self) -> str:
        printed = self._printed()
        return [what for line, what in self._stages if line in printed][-1]


def _members(session: int) -> dict[int, bool]:
    """The processes of a session that have not ended; True for each resource tracker."""
    members = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            state, _, _, its_session = (process / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(its_session) == session and state != "Z":
                members[int(process.name)] = _TRACKER in (process / "cmdline").read_bytes()
    return members


def arguments_of(options: Mapping[str, object]) -> list[str]:
    """The arguments of a command line: each option, and its value."""
    return [str(word) for option in options.items() for word in option]


def num_threads() -> str:
    """Value of OMP_NUM_THREADS for a server on a CPU.

    A thread that waits by spinning would cost the trainer a core.
    """
    return os.environ.get("OMP_NUM_THREADS", "1")


def free_port() -> int:
    """A port of the loopback interface on which nobody listens.

    The server binds it a minute later, so it is none of the ports that the kernel gives to
    connections.
    """
    for port in random.SystemRandom().sample(_PORTS, len(_PORTS)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError(errno.EADDRINUSE, f"no port from {_PORTS[0]} to {_PORTS[-1]} is free")
