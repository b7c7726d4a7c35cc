"""The embedded sandbox: a fork server, restarted when it dies, and the sessions given out."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tir_alp.tools.sandbox.budget import MemoryBudget, budget_of_this_machine
from tir_alp.tools.sandbox.config import SandboxConfig
from tir_alp.tools.sandbox.fork_server import ForkServer
from tir_alp.tools.sandbox.jails import Jail
from tir_alp.tools.sandbox.process import InterpreterProcess
from tir_alp.tools.sandbox.report import SandboxReport
from tir_alp.tools.sandbox.result import SandboxError, SandboxRefused
from tir_alp.tools.sandbox.session import MakeProcess, PythonSession

_NEWS_S = 0.05
"""How long the death of a fork server may go unnoticed after it has left a request unanswered."""


class LocalSandbox:
    """Sessions on this machine, in one kind of jail. See `base.Sandbox`."""

    def __init__(self, config: SandboxConfig, jail: Jail, report: SandboxReport) -> None:
        self.jail = jail
        self.report = report
        self._config = config
        self._server = ForkServer(jail)
        self._servers_of_one: weakref.WeakSet[ForkServer] = weakref.WeakSet()
        self._restart = asyncio.Lock()
        self._free_slots = asyncio.Semaphore(config.max_sessions)
        self._sessions: set[PythonSession] = set()
        self.budget = MemoryBudget(
            config.memory_budget_mb or budget_of_this_machine(), config.max_wait_s
        )

    async def start(self) -> None:
        """Start the fork server.

        Raises:
            SandboxRefused: It does not come up on this machine.
        """
        if self.jail.one_session:  # each session starts its own
            return
        try:
            await self._server.start()
        except SandboxError as error:
            raise SandboxRefused(f"the sandbox does not start on this machine: {error}") from error

    async def stop(self) -> None:
        """End every session and the fork server."""
        await asyncio.gather(*(session.close() for session in list(self._sessions)))
        servers = (self._server, *self._servers_of_one)
        await asyncio.gather(*(server.stop() for server in servers))

    @asynccontextmanager
    async def session(self) -> AsyncIterator[PythonSession]:
        """A stateful interpreter that is killed at the end of the block.

        Raises:
            SandboxError: No session became free, or none could be made.
        """
        session = await self.open_session()
        try:
            yield session
        finally:
            await session.close()

    async def open_session(self) -> PythonSession:
        """As `session`, for a caller that closes it itself."""
        return await self._admit(self._start_process)

    async def _admit(self, make_process: MakeProcess) -> PythonSession:
        """Wait for a free slot; the session gives it back when it closes."""
        try:
            # Not `wait_for`: before Python 3.12 it can swallow a cancellation.
            async with asyncio.timeout(self._config.max_wait_s):
                await self._free_slots.acquire()
        except TimeoutError:
            count = self._config.max_sessions
            raise SandboxError(
                f"all {count} sessions are in use since {self._config.max_wait_s:g} s; "
                "close some or raise max_sessions"
            ) from None
        try:
            process = await make_process()
        except BaseException:
            self._free_slots.release()
            raise
        session = PythonSession(
            process,
            self._config,
            self.budget,
            restart=self._start_process,
            admit=self._admit,
            on_close=self._release,
        )
        self._sessions.add(session)
        return session

    def _release(self, session: PythonSession) -> None:
        self._sessions.discard(session)
        self._free_slots.release()

    async def _start_process(self) -> InterpreterProcess:
        if self.jail.one_session:
            return await self._start_alone()
        server = await self._live_server()
        try:
            return await InterpreterProcess.start(server)
        except SandboxError:
            await asyncio.sleep(_NEWS_S)
            if not server.dead:
                raise
        return await InterpreterProcess.start(await self._live_server())

    async def _start_alone(self) -> InterpreterProcess:
        """An interpreter whose fork server has no other, and ends with it and its branches."""
        server = ForkServer(self.jail)
        self._servers_of_one.add(server)
        try:
            await server.start()
            process = await InterpreterProcess.start(server)
        except BaseException:
            await server.stop()
            raise
        return process

    async def _live_server(self) -> ForkServer:
        async with self._restart:
            if self._server.dead:
                await self._server.stop()
                self._server = ForkServer(self.jail)
                await self._server.start()
            return self._server
