"""A server's process: how it is started, what it says meanwhile, and how it ends for certain.

A server is a session of processes of its own. The kernel kills it when we are gone, whatever ended
us (`lifetime.die_with_parent`), and we kill the whole session when it is to go.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tir_alp.engines.base import EngineFailed
from tir_alp.engines.http_client import ServerClient
from tir_alp.engines.lifetime import PARENT_VARIABLE

_POLL_S = 0.5
_SAY_EVERY_S = 10.0
_END_S = 60.0
_TAIL_LINES, _LINE_LENGTH = 25, 300  # one of them is all of the server's settings


class ServerProcess:
    """One server that we start and end.

    Args:
        name: To people.
        command: What is run.
        environment: What is added to ours.
        log: File that gets what it prints.
        say: Told of its progress.
        stages: Lines of its log, in order, and what it does from there on; "" is the start.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        say: Callable[[str], None],
        stages: Sequence[tuple[str, str]],
    ) -> None:
        self.name = name
        self.log = log
        self._command, self._environment = command, environment
        self._say, self._stages = say, stages
        self._process: asyncio.subprocess.Process | None = None
        self._log_start = 0

    @property
    def pid(self) -> int | None:
        """Process id of the server's first process, and id of its session."""
        return self._process.pid if self._process is not None else None

    async def start(self, *arguments: str) -> None:
        """Start the process, with more words for its command line."""
        with self.log.open("ab") as log:
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
                self._say(f"{self.name}: {stage} ({now - began:.0f} s)")
            await asyncio.sleep(_POLL_S)
        self._say(f"{self.name}: ready after {time.monotonic() - began:.0f} s")

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
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        try:
            async with asyncio.timeout(_END_S):
                await self._process.wait()
        except TimeoutError:
            raise EngineFailed(f"{self.name} has not ended {_END_S:g} s after SIGKILL") from None

    def tail(self) -> str:
        """The last lines that it printed since its start."""
        lines = self._printed().splitlines()[-_TAIL_LINES:]
        return "\n".join(line[:_LINE_LENGTH] for line in lines)

    def _printed(self) -> str:
        with self.log.open("rb") as log:
            log.seek(self._log_start)
            return log.read().decode(errors="replace")

    def _stage(self) -> str:
        printed = self._printed()
        return [what for line, what in self._stages if line in printed][-1]
