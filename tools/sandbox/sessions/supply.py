"""Where interpreters come from: the fork server in use, and a few that it has forked ahead.

A fork server that has died is replaced by whoever needs the next interpreter. One that is worn out
is replaced in the background: it lives on beside its successor until its last interpreter ends.
A jail for one session has a fork server for each, which ends with it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque

from tir_alp.tools.sandbox.backends.gvisor import AnyJail, GuestJail
from tir_alp.tools.sandbox.config import SandboxConfig
from tir_alp.tools.sandbox.interpreters.fork_server_client import ForkServer
from tir_alp.tools.sandbox.interpreters.forked import InterpreterProcess
from tir_alp.tools.sandbox.interpreters.gvisor_client import Guest
from tir_alp.tools.sandbox.interpreters.in_gvisor import GuestProcess
from tir_alp.tools.sandbox.interpreters.interpreter import Interpreter
from tir_alp.tools.sandbox.result import SandboxError

_NEWS_S = 0.05
"""How long the death of a fork server may go unnoticed after it has left a request unanswered."""


class InterpreterSupply:
    """Gives out fresh interpreters, in which nothing has run yet."""

    def __init__(self, jail: AnyJail, config: SandboxConfig) -> None:
        self._jail = jail
        self._config = config
        self._servers: set[ForkServer | Guest] = set()
        """All that are not stopped: the one in use, one that is starting, one that is retired."""
        self._server = self._new_server()
        self._replacing = asyncio.Lock()
        self._ready: deque[Interpreter] = deque()
        self._upkeep: asyncio.Task[None] | None = None
        self._retirement: asyncio.Task[None] | None = None
        self._stopped = False

    @property
    def num_ready(self) -> int:
        """How many can be had at once."""
        return len(self._ready)

    async def start(self) -> None:
        """Start the fork server.

        Raises:
            SandboxError: It does not come up.
        """
        if not self._jail.one_session:
            await self._server.start()
        self._start_upkeep()

    async def stop(self) -> None:
        """End every fork server, and what nobody has taken."""
        self._stopped = True
        tasks = [task for task in (self._upkeep, self._retirement) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._drop_ready()
        await asyncio.gather(*map(self._end, tuple(self._servers)))

    async def take(self) -> Interpreter:
        """An interpreter for whoever asks: one that is ready, or a new one.

        Raises:
            SandboxError: None could be made.
        """
        try:
            return await self._take_ready() or await self._fork()
        finally:
            self._start_upkeep()

    async def _take_ready(self) -> Interpreter | None:
        while self._ready:
            process = self._ready.popleft()
            process.poll()
            if process.lost is None:
                return process
            await process.kill()
        return None

    async def _fork(self) -> Interpreter:
        if self._jail.one_session:
            return await self._fork_alone()
        server = await self._live_server()
        try:
            return await _born_of(server)
        except SandboxError:
            await asyncio.sleep(_NEWS_S)
            if not server.dead:
                raise
        return await _born_of(await self._live_server())

    async def _fork_alone(self) -> Interpreter:
        """An interpreter whose fork server has no other, and ends with it and its branches."""
        if self._stopped:
            raise SandboxError("the sandbox is closed")
        self._servers -= {server for server in self._servers if server.stopped}
        server = self._new_server()
        try:
            await server.start()
            return await _born_of(server)
        except BaseException:
            await self._end(server)
            raise

    async def _live_server(self) -> ForkServer | Guest:
        async with self._replacing:
            if self._stopped:
                raise SandboxError("the sandbox is closed")
            if self._server.dead:
                await self._end(self._server)
                self._server = self._new_server()
                await self._server.start()
            return self._server

    def _start_upkeep(self) -> None:
        if not self._stopped and (self._upkeep is None or self._upkeep.done()):
            self._upkeep = asyncio.create_task(self._keep_up())

    async def _keep_up(self) -> None:
        """In the background: replace a worn fork server, then make up for what was taken."""
        with contextlib.suppress(SandboxError):  # whoever takes the next one forks, and is told
            is_alone = self._retirement is None or self._retirement.done()
            if is_alone and self._server.worn_out(self._config.fork_server_lifetime):
                await self._replace_server()
            while len(self._ready) < self._config.ready_sessions:
                self._ready.append(await self._fork())

    async def _replace_server(self) -> None:
        worn, fresh = self._server, self._new_server()
        await fresh.start()
        if self._server is not worn:  # it died meanwhile, and has a successor already
            await self._end(fresh)
            return
        self._server = fresh
        self._retirement = asyncio.create_task(self._retire(worn))
        await self._drop_ready()

    async def _retire(self, server: ForkServer | Guest) -> None:
        await server.vacated()
        await self._end(server)

    def _new_server(self) -> ForkServer | Guest:
        try:
            jail = self._jail
            server = Guest(jail) if isinstance(jail, GuestJail) else ForkServer(jail)
        except OSError as error:
            raise SandboxError(f"no descriptors for another fork server: {error}") from error
        self._servers.add(server)
        return server

    async def _end(self, server: ForkServer | Guest) -> None:
        await server.stop()
        self._servers.discard(server)

    async def _drop_ready(self) -> None:
        while self._ready:
            await self._ready.popleft().kill()


async def _born_of(server: ForkServer | Guest) -> Interpreter:
    if isinstance(server, Guest):
        return await GuestProcess.start(server)
    return await InterpreterProcess.start(server)
