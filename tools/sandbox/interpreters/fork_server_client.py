"""The host's end of a fork server: starts it, asks it for sessions, notices when it dies.

`ForkServerHost` in `forked.py` is this client together with the interpreters that it makes.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import os
import socket
from dataclasses import dataclass
from typing import IO, Protocol

from tir_alp.tools.sandbox.config import Lifetime
from tir_alp.tools.sandbox.endings import SERVER_DIED, Death
from tir_alp.tools.sandbox.jail.credentials import CREDENTIALS_SPACE, sender
from tir_alp.tools.sandbox.jail.spec import JailSpec
from tir_alp.tools.sandbox.machine.usage import ProcessUsage
from tir_alp.tools.sandbox.result import SandboxError

_START_TIMEOUT_S = 120.0
_REQUEST_TIMEOUT_S = 20.0
_STOP_TIMEOUT_S = 10.0
_MAX_MESSAGE = 1 << 16
# Descriptors that are on their way through a socket count against the limit of open files of every
# process of the same ordinary user, and a session's limit is low.
_BIRTHS_AT_ONCE = 16


class Launched(Protocol):
    """A fork server that has been launched."""

    async def end(self) -> None:
        """Kill it and wait until it is dead. What it has forked may outlive it by moments."""
        ...


class ForkServerJail(Protocol):
    """What a fork server needs to know about its jail."""

    @property
    def spec(self) -> JailSpec:
        """What the sessions may do; sent to the fork server."""
        ...

    @property
    def max_threads(self) -> int | None:
        """How many threads the host lets an interpreter have; None where the kernel counts them."""
        ...

    @property
    def one_session(self) -> bool:
        """Whether each session gets a fork server of its own."""
        ...

    async def launch(
        self, requests: socket.socket, obituaries: socket.socket, errors: IO[bytes]
    ) -> Launched:
        """Launch a fork server.

        Args:
            requests: The fork server's end of the socket for requests and their answers.
            obituaries: The keepers' end of the socket on which they report deaths.
            errors: Where the fork server writes what goes wrong.

        Raises:
            SandboxError: It could not be launched.
        """
        ...


class ForkServer:
    """A live fork server. Once it is `dead` it stays dead: start another."""

    def __init__(self, jail: ForkServerJail) -> None:
        self.jail = jail
        self.dead = False
        self.stopped = False
        self.births = asyncio.Semaphore(_BIRTHS_AT_ONCE)
        """Held while an interpreter is born."""
        self.num_sessions = 0
        """Number of sessions that it has been asked for so far."""
        self._num_residents = 0
        self._vacant = asyncio.Event()
        self._vacant.set()
        self._usage: ProcessUsage | None = None
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[str]] = {}
        self._deaths: dict[tuple[int, int], asyncio.Future[Death]] = {}
        self._channels: _Channels | None = None
        self._ready: asyncio.Future[None] | None = None
        self._launched: Launched | None = None
        self._all_gone: asyncio.Future[None] | None = None
        self._stopping: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """See `InterpreterHost`."""
        loop = asyncio.get_running_loop()
        self._ready, self._all_gone = loop.create_future(), loop.create_future()
        try:
            self._channels = channels = _Channels.open()
            theirs = channels.their_requests, channels.their_obituaries
            self._launched = await self.jail.launch(*theirs, channels.errors)
            channels.close_theirs()
            loop.add_reader(channels.requests, self._on_answer)
            loop.add_reader(channels.obituaries, self._on_obituary)
            with contextlib.suppress(OSError):  # dead already; `_on_answer` reads its last words
                spec = dataclasses.asdict(self.jail.spec)
                channels.requests.send(json.dumps(spec).encode())
            async with asyncio.timeout(_START_TIMEOUT_S):  # `wait_for` can swallow a cancellation
                await asyncio.shield(self._ready)
        except BaseException as error:
            await self.stop()
            if isinstance(error, TimeoutError):
                late = f"the fork server was not ready within {_START_TIMEOUT_S:g} s"
                raise SandboxError(late) from None
            if isinstance(error, OSError):
                raise SandboxError(f"the fork server did not start: {error}") from error
            raise

    def poll(self) -> None:
        """Notice a death that the event loop has not reported yet."""
        if not self.dead:
            self._on_answer()

    def fork_session(self, descriptors: list[int]) -> int:
        """Ask for a session on (control, stdout, stderr); it greets on its control socket.

        Returns:
            The number of the session's family, by which `death` knows its processes.
        """
        number = next(self._numbers)
        self._send({"op": "session", "id": number}, descriptors)
        self.num_sessions += 1
        return number

    async def furnish_branch(self, pidfd: int) -> None:
        """Give a branch its user, and a copy of its own of the /tmp that it still shares."""
        number = next(self._numbers)
        answer = asyncio.get_running_loop().create_future()
        self._answers[number] = answer
        try:
            self._send({"op": "furnish_branch", "id": number}, [pidfd])
            async with asyncio.timeout(_REQUEST_TIMEOUT_S):
                error = await answer
        except TimeoutError:
            error = f"no answer within {_REQUEST_TIMEOUT_S} s"
        finally:
            del self._answers[number]
        if error:
            raise SandboxError(f"the branch could not be furnished: {error}")

    def death(self, family: int, pid: int) -> asyncio.Future[Death]:
        """The death of an interpreter, set once its keeper has reaped it."""
        key = (family, pid)
        if key not in self._deaths:
            self._deaths[key] = asyncio.get_running_loop().create_future()
            if self.dead:
                self._deaths[key].set_result(SERVER_DIED)
        return self._deaths[key]

    def move_in(self) -> None:
        """Count one more interpreter that depends on this fork server, born or about to be."""
        self._num_residents += 1
        self._vacant.clear()

    async def move_out(self, family: int, pid: int) -> None:
        """Count one less and forget its death. The last one ends a fork server of one session."""
        self._deaths.pop((family, pid), None)
        self._num_residents -= 1
        if self._num_residents:
            return
        self._vacant.set()
        if self.jail.one_session:
            self._mark_dead("its session is over")
            await self.stop()

    def worn_out(self, lifetime: Lifetime) -> str:
        """See `InterpreterHost`."""
        if self.dead or self._usage is None:
            return ""
        self._usage.measure()
        return lifetime.exceeded(self.num_sessions, "sessions", self._usage)

    async def vacated(self) -> None:
        """See `InterpreterHost`."""
        await self._vacant.wait()

    async def stop(self) -> None:
        """See `InterpreterHost`."""
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop())
        await asyncio.shield(self._stopping)

    async def _stop(self) -> None:
        self._mark_dead("it was stopped")
        if self._channels is not None:
            self._channels.close_theirs()
            if self._launched is not None and self._all_gone is not None:
                # The keepers end with it, and with the last keeper the obituaries.
                await self._launched.end()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_STOP_TIMEOUT_S):
                        await asyncio.shield(self._all_gone)
                asyncio.get_running_loop().remove_reader(self._channels.obituaries)
            self._channels.close()
        if self._usage is not None:
            self._usage.close()
        self.stopped = True

    def _send(self, message: dict[str, object], descriptors: list[int]) -> None:
        if self.dead or self._channels is None:
            raise SandboxError("the fork server is dead")
        try:
            data = json.dumps(message).encode()
            socket.send_fds(self._channels.requests, [data], descriptors)
        except OSError as error:
            raise SandboxError(f"the fork server does not take requests: {error}") from error

    def _on_answer(self) -> None:
        assert self._channels is not None
        try:
            received = self._channels.requests.recvmsg(_MAX_MESSAGE, CREDENTIALS_SPACE)
            data, ancillary, _, _ = received
        except BlockingIOError:
            return
        except OSError:
            data, ancillary = b"", []
        if not data:
            self._mark_dead(self._channels.last_words())
            return
        message = json.loads(data)
        if message.get("ready"):
            self._on_ready(sender(ancillary))
        elif (answer := self._answers.get(message["id"])) is not None and not answer.done():
            answer.set_result(message["error"])

    def _on_ready(self, pid: int) -> None:
        assert self._channels is not None
        self._channels.requests.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 0)
        if self._ready is None or self._ready.done():
            return
        try:
            self._usage = ProcessUsage(pid)
        except OSError as error:
            self._ready.set_exception(SandboxError(f"the fork server is gone: {error}"))
        else:
            self._ready.set_result(None)

    def _on_obituary(self) -> None:
        assert self._channels is not None
        try:
            data = self._channels.obituaries.recv(_MAX_MESSAGE)
        except BlockingIOError:
            return
        if not data:  # the fork server and every keeper held the other end
            asyncio.get_running_loop().remove_reader(self._channels.obituaries)
            assert self._all_gone is not None
            self._all_gone.set_result(None)
            return
        family, pid, status, limit = json.loads(data)
        death = self._deaths.get((family, pid))
        if death is not None and not death.done():
            death.set_result(Death(status, limit))

    def _mark_dead(self, reason: str) -> None:
        if self.dead:
            return
        self.dead = True
        if self._channels is not None:
            asyncio.get_running_loop().remove_reader(self._channels.requests)
            self._channels.requests.close()
        error = SandboxError(f"the fork server died: {reason}")
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(error)
            self._ready.exception()  # retrieved, even if nobody waits any more
        for death in self._deaths.values():
            if not death.done():
                death.set_result(SERVER_DIED)
        for answer in self._answers.values():
            if not answer.done():
                answer.set_result(str(error))


@dataclass(frozen=True, slots=True)
class _Channels:
    """The descriptors between the host and one fork server: two sockets and a file."""

    requests: socket.socket
    their_requests: socket.socket
    obituaries: socket.socket
    their_obituaries: socket.socket
    errors: IO[bytes]
    """In memory: a full disk must not keep a jail from starting."""

    @classmethod
    def open(cls) -> _Channels:
        with contextlib.ExitStack() as undo:
            errors = undo.enter_context(open(os.memfd_create("errors"), "w+b"))
            pairs = [_socket_pair(undo) for _ in range(2)]
            (requests, their_requests), (obituaries, their_obituaries) = pairs
            requests.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            undo.pop_all()
        return cls(requests, their_requests, obituaries, their_obituaries, errors)

    def close_theirs(self) -> None:
        self.their_requests.close()
        self.their_obituaries.close()

    def close(self) -> None:
        self.close_theirs()
        self.requests.close()
        self.obituaries.close()
        self.errors.close()

    def last_words(self) -> str:
        """The last line that the fork server wrote before it died."""
        self.errors.seek(0)
        text = self.errors.read(64_000).decode("utf-8", "backslashreplace").strip()
        return text.splitlines()[-1] if text else "no message"


def _socket_pair(undo: contextlib.ExitStack) -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    undo.callback(ours.close)
    undo.callback(theirs.close)
    ours.setblocking(False)
    return ours, theirs
