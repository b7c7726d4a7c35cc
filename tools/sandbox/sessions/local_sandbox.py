"""The sandbox on this machine: admits sessions and keeps count of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tir_alp.tools.sandbox.backends.jail_protocol import Jail
from tir_alp.tools.sandbox.config import SandboxConfig
from tir_alp.tools.sandbox.machine.budget import NOTHING, Budget, Resources
from tir_alp.tools.sandbox.machine.capacity import (
    provide_open_files,
    share_of_free_memory_mb,
    share_of_free_processes,
)
from tir_alp.tools.sandbox.result import SandboxError, SandboxRefused, SandboxReport
from tir_alp.tools.sandbox.sessions.session import MakeInterpreter, PythonSession
from tir_alp.tools.sandbox.sessions.supply import InterpreterSupply


class LocalSandbox:
    """Sessions on this machine, in one kind of jail. See `base.Sandbox`."""

    def __init__(self, config: SandboxConfig, jail: Jail, report: SandboxReport) -> None:
        self.jail = jail
        self.report = report
        self._config = config
        self._supply = InterpreterSupply(jail, config)
        self._free_slots = asyncio.Semaphore(config.max_sessions)
        self._sessions: set[PythonSession] = set()
        total = Resources(
            memory_mb=config.memory_budget_mb or share_of_free_memory_mb(),
            processes=config.process_budget or share_of_free_processes(),
        )
        self.budget = Budget(total, config.max_wait_s)
        self.budget.settle(self, Resources(processes=2 * config.ready_sessions))

    @property
    def num_ready_sessions(self) -> int:
        """Number of idle interpreters that wait for a session to open."""
        return self._supply.num_ready

    async def start(self) -> None:
        """Start the host of interpreters.

        Raises:
            SandboxRefused: It does not come up, or this process may not open enough files.
        """
        num_interpreters = self._config.max_sessions + self._config.ready_sessions
        # Beside the fork server in use there can be a retired one and one that is starting.
        provide_open_files(num_interpreters, num_interpreters if self.jail.one_session else 3)
        try:
            await self._supply.start()
        except SandboxError as error:
            raise SandboxRefused(f"the sandbox does not start on this machine: {error}") from error

    async def stop(self) -> None:
        """End every session and every host of interpreters."""
        await asyncio.gather(*(session.close() for session in list(self._sessions)))
        await self._supply.stop()

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
        """As `session`, for a caller that closes the session itself."""
        return await self._admit(self._supply.take)

    async def _admit(self, make_interpreter: MakeInterpreter) -> PythonSession:
        """Wait for a free slot; the session gives it back when it closes."""
        try:
            # Not `wait_for`: before Python 3.12 it can swallow a cancellation.
            async with asyncio.timeout(self._config.max_wait_s):
                await self._free_slots.acquire()
        except TimeoutError:
            count = self._config.max_sessions
            raise SandboxError(
                f"all {count} sessions have been in use for {self._config.max_wait_s:g} s: "
                "close some or raise max_sessions"
            ) from None
        birth = object()
        try:
            # As much as a call may use, so that there is always room for one call of the sessions
            # that are admitted.
            await self.budget.reserve(birth, Resources(processes=self._config.max_processes))
            interpreter = await make_interpreter()
            session = PythonSession(
                interpreter,
                self._config,
                self.budget,
                restart=self._supply.take,
                admit=self._admit,
                on_close=self._release,
            )
            self.budget.settle(session, interpreter.holds)
        except BaseException:
            self._free_slots.release()
            raise
        finally:
            self.budget.settle(birth, NOTHING)
        self._sessions.add(session)
        return session

    def _release(self, session: PythonSession) -> None:
        self._sessions.discard(session)
        self._free_slots.release()
