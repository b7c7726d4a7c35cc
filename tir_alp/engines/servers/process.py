"""A server's process: how it is started, what it says meanwhile, and how it ends for certain.

A server is a session of processes of its own. The kernel kills it when we are gone, whatever ended
us (`lifetime.die_with_parent`), and we kill the whole session when it is to go.

Python's resource trackers are left out of both. Each knows which shared memory and semaphores the
processes of its server made, removes them when the last of those is gone, and ends.
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
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from tir_alp.engines.base import EngineFailed
from tir_alp.engines.servers.http_client import ServerClient
from tir_alp.engines.servers.lifetime import PARENT_VARIABLE

_POLL_S = 0.5
_SAY_EVERY_S = 10.0
_END_S = 60.0
_TIDY_S = 10.0  # of it, for what the killed ones left to be removed
_TIDY_POLL_S = 0.05
_PORTS = range(20000, 32768)  # Linux gives those behind to connections
_TRACKER = b"multiprocessing.resource_tracker"
_TAIL_LINES, _LINE_LENGTH = 25, 300  # one of them is all of the server's settings


class ServerProcess:
    """One server that we start and end.

    Args:
        name: To people.
        command: What is run.
        environment: What is added to ours.
        log_path: File that gets what it prints.
        log: Told of its progress.
        stages: Lines of its log, in order, and what it does from there on; "" is the start.
        leaves: How the names of its files below /dev/shm begin that it leaves behind when it is
            killed; those that it had mapped are removed with it. "": it leaves none.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        log_path: Path,
        log: Callable[[str], None],
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
        """Process id of the server's first process, and id of its session."""
        return self._process.pid if self._process is not None else None

    async def start(self, *arguments: str) -> None:
        """Start the process, with more words for its command line."""
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
        """Wait until the server answers, and say what it does meanwhile.

        Raises:
            EngineFailed: With the end of its log, if it ends or is not ready in time.
        """
        assert self._process is not None
        began = said = time.monotonic()
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
            if (reached := self._stage()) != stage or now - said > _SAY_EVERY_S:
                stage, said = reached, now
                self._log(f"{self.name}: {stage} ({now - began:.0f} s)")
            await asyncio.sleep(_POLL_S)
        self._note_shared_memory(_members(self._process.pid))
        self._log(f"{self.name}: ready after {time.monotonic() - began:.0f} s")

    async def ended(self) -> int:
        """Wait until the process has ended; returns its exit code."""
        assert self._process is not None
        return await self._process.wait()

    async def kill(self) -> None:
        """End every process of the server, also one that is stopped.

        Raises:
            EngineFailed: If it is still there after a minute; the kernel holds it then.
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
        """The last lines that it printed since its start."""
        lines = self._printed().splitlines()[-_TAIL_LINES:]
        return "\n".join(line[:_LINE_LENGTH] for line in lines)

    def _printed(self) -> str:
        with self.log_path.open("rb") as log:
            log.seek(self._log_start)
            return log.read().decode(errors="replace")

    def _note_shared_memory(self, pids: Iterable[int]) -> None:
        for pid in pids if self._leaves else ():
            with contextlib.suppress(OSError):  # it ended meanwhile
                for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                    if (path := line.partition("/")[2]).startswith(f"dev/shm/{self._leaves}"):
                        self._left.add(Path("/", path))

    def _stage(self) -> str:
        printed = self._printed()
        return [what for line, what in self._stages if line in printed][-1]


def _members(session: int) -> dict[int, bool]:
    """Processes of a session that have not ended, and whether each is a resource tracker."""
    members = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            state, _, _, its_session = (process / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(its_session) == session and state != "Z":
                members[int(process.name)] = _TRACKER in (process / "cmdline").read_bytes()
    return members


def free_port() -> int:
    """A port of the loopback interface that nobody listens at.

    A server takes it a minute later. So it is none of those that the kernel gives to connections.
    """
    for port in random.SystemRandom().sample(_PORTS, len(_PORTS)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError(errno.EADDRINUSE, f"no port from {_PORTS[0]} to {_PORTS[-1]} is free")
