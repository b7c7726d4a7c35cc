"""Where interpreters come from: the host in use, and a few interpreters that it has made ahead.

A host that has died is replaced when the next interpreter is needed. A host that is worn out is
replaced in the background; it lives on beside its successor until its last interpreter ends. In a
jail for one session, each session has a host of its own, which ends with the session.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque

from tir_alp.tools.sandbox.backends.jail_protocol import Jail
from tir_alp.tools.sandbox.config import SandboxConfig
from tir_alp.tools.sandbox.interpreters.host import InterpreterHost
from tir_alp.tools.sandbox.interpreters.interpreter import Interpreter
from tir_alp.tools.sandbox.result import SandboxError

_UNNOTICED_S = 0.05
"""How long the death of a host may go unnoticed after it has left a request unanswered."""


class InterpreterSupply:
    """Gives out fresh interpreters, in which nothing has run yet."""

    def __init__(self, jail: Jail, config: SandboxConfig) -> None:
        self._jail = jail
        self._config = config
        self._hosts: set[InterpreterHost] = set()
        """All that are not stopped: the one in use, one that is starting, one that is retired."""
        self._host = self._new_host()
        self._replacing = asyncio.Lock()
        self._ready: deque[Interpreter] = deque()
        self._upkeep: asyncio.Task[None] | None = None
        self._retirement: asyncio.Task[None] | None = None
        self._stopped = False

    @property
    def num_ready(self) -> int:
        """Number of interpreters that can be had at once."""
        return len(self._ready)

    async def start(self) -> None:
        """Start the host, unless each session gets its own.

        Raises:
            SandboxError: It does not come up.
        """
        if not self._jail.one_session:
            await self._host.start()
        self._start_upkeep()

    async def stop(self) -> None:
        """End every host and every interpreter that nobody has taken."""
        self._stopped = True
        tasks = [task for task in (self._upkeep, self._retirement) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._drop_ready()
        await asyncio.gather(*map(self._end, tuple(self._hosts)))

    async def take(self) -> Interpreter:
        """Give out an interpreter: one that is ready, or a new one.

        Raises:
            SandboxError: None could be made.
        """
        try:
            return await self._take_ready() or await self._make()
        finally:
            self._start_upkeep()

    async def _take_ready(self) -> Interpreter | None:
        while self._ready:
            interpreter = self._ready.popleft()
            interpreter.poll()
            if interpreter.lost is None:
                return interpreter
            await interpreter.kill()
        return None

    async def _make(self) -> Interpreter:
        if self._jail.one_session:
            return await self._make_alone()
        host = await self._live_host()
        try:
            return await host.new_interpreter()
        except SandboxError:
            await asyncio.sleep(_UNNOTICED_S)
            if not host.dead:
                raise
        return await (await self._live_host()).new_interpreter()

    async def _make_alone(self) -> Interpreter:
        """An interpreter with a host of its own, which ends with it and its branches."""
        if self._stopped:
            raise SandboxError("the sandbox is closed")
        self._hosts -= {host for host in self._hosts if host.stopped}
        host = self._new_host()
        try:
            await host.start()
            return await host.new_interpreter()
        except BaseException:
            await self._end(host)
            raise

    async def _live_host(self) -> InterpreterHost:
        async with self._replacing:
            if self._stopped:
                raise SandboxError("the sandbox is closed")
            if self._host.dead:
                await self._end(self._host)
                self._host = self._new_host()
                await self._host.start()
            return self._host

    def _start_upkeep(self) -> None:
        if not self._stopped and (self._upkeep is None or self._upkeep.done()):
            self._upkeep = asyncio.create_task(self._keep_up())

    async def _keep_up(self) -> None:
        """In the background: replace a worn host, then make up for what was taken."""
        with contextlib.suppress(SandboxError):  # `take` makes the next one itself, and raises
            is_alone = self._retirement is None or self._retirement.done()
            if is_alone and self._host.worn_out(self._config.fork_server_lifetime):
                await self._replace_host()
            while len(self._ready) < self._config.ready_sessions:
                self._ready.append(await self._make())

    async def _replace_host(self) -> None:
        worn, fresh = self._host, self._new_host()
        await fresh.start()
        if self._host is not worn:  # it died meanwhile, and has a successor already
            await self._end(fresh)
            return
        self._host = fresh
        self._retirement = asyncio.create_task(self._retire(worn))
        await self._drop_ready()

    async def _retire(self, host: InterpreterHost) -> None:
        await host.vacated()
        await self._end(host)

    def _new_host(self) -> InterpreterHost:
        host = self._jail.new_host()
        self._hosts.add(host)
        return host

    async def _end(self, host: InterpreterHost) -> None:
        await host.stop()
        self._hosts.discard(host)

    async def _drop_ready(self) -> None:
        while self._ready:
            await self._ready.popleft().kill()
