"""The host's end of the fork server: starts it, asks it for sessions, notices when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import os
import socket

from tir_alp.tools.sandbox.backends.jail_protocol import Jail, Started
from tir_alp.tools.sandbox.config import Lifetime
from tir_alp.tools.sandbox.endings import SERVER_DIED, Death
from tir_alp.tools.sandbox.interpreters.descriptors import CREDENTIALS_SPACE, sender
from tir_alp.tools.sandbox.machine.usage import ProcessStatus
from tir_alp.tools.sandbox.result import SandboxError

_START_TIMEOUT_S = 120.0
_REQUEST_TIMEOUT_S = 20.0
_STOP_TIMEOUT_S = 10.0
_MAX_MESSAGE = 1 << 16


# Descriptors that are on their way through a socket count against the limit of open files of any
# one process of the same ordinary user, and a session's limit is low.
_BIRTHS_AT_ONCE = 16


class ForkServer:
    """A live fork server. Once it is `dead` it stays so: start another."""

    def __init__(self, jail: Jail) -> None:
        self.jail = jail
        self.dead = False
        self.births = asyncio.Semaphore(_BIRTHS_AT_ONCE)
        """Hold it while an interpreter is born."""
        self.num_sessions = 0
        """That it has been asked for so far."""
        self._num_residents = 0
        self._vacant = asyncio.Event()
        self._vacant.set()
        self._status: ProcessStatus | None = None
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[str]] = {}
        self._deaths: dict[tuple[int, int], asyncio.Future[Death]] = {}
        self._started: asyncio.Future[None] | None = None
        self._running: Started | None = None
        self._all_gone: asyncio.Future[None] | None = None
        self._stopping: asyncio.Task[None] | None = None
        # In memory: a full disk must not keep a jail from starting. Closed by `stop`.
        self._errors = open(os.memfd_create("errors"), "w+b")  # noqa: SIM115
        self._requests, self._their_requests = _socket_pair()
        self._requests.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._obituaries, self._their_obituaries = _socket_pair()

    async def start(self) -> None:
        """Start the jail and wait until its modules are loaded.

        Raises:
            SandboxError: It did not come up; the message has its last words.
        """
        loop = asyncio.get_running_loop()
        self._started, self._all_gone = loop.create_future(), loop.create_future()
        theirs = self._their_requests, self._their_obituaries
        try:
            self._running = await self.jail.start(*theirs, self._errors)
            self._close_their_ends()
            loop.add_reader(self._requests, self._on_answer)
            loop.add_reader(self._obituaries, self._on_obituary)
            with contextlib.suppress(OSError):  # dead already; `_on_answer` reads its last words
                self._requests.send(json.dumps(dataclasses.asdict(self.jail.spec)).encode())
            async with asyncio.timeout(_START_TIMEOUT_S):  # `wait_for` can swallow a cancellation
                await asyncio.shield(self._started)
        except BaseException as error:
            await self.stop()
            if isinstance(error, OSError) and not isinstance(error, TimeoutError):
                raise SandboxError(f"the fork server did not start: {error}") from error
            if isinstance(error, TimeoutError):
                late = f"the fork server was not ready within {_START_TIMEOUT_S:g} s"
                raise SandboxError(late) from None
            raise

    def poll(self) -> None:
        """Notice a death of which the event loop has not told yet."""
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
        """Give a branch its user and its own copy of the /tmp that it still shares."""
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
        """The death of an interpreter, once its keeper has reaped it."""
        key = (family, pid)
        if key not in self._deaths:
            self._deaths[key] = asyncio.get_running_loop().create_future()
            if self.dead:
                self._deaths[key].set_result(SERVER_DIED)
        return self._deaths[key]

    def move_in(self) -> None:
        """Count one interpreter that depends on this fork server, born or about to be."""
        self._num_residents += 1
        self._vacant.clear()

    async def move_out(self, family: int, pid: int) -> None:
        """Count one less, and forget its death. The last one ends a server of one session."""
        self._deaths.pop((family, pid), None)
        self._num_residents -= 1
        if self._num_residents:
            return
        self._vacant.set()
        if self.jail.one_session:
            self._mark_dead("its session is over")
            await self.stop()

    def worn_out(self, lifetime: Lifetime) -> str:
        """Why it should not be used any longer; empty if it may."""
        if self.dead or self._status is None:
            return ""
        self._status.measure()
        return lifetime.exceeded(self.num_sessions, "sessions", self._status)

    async def vacated(self) -> None:
        """Wait until no interpreter depends on it any more."""
        await self._vacant.wait()

    @property
    def stopped(self) -> bool:
        """Whether nothing of it is left."""
        return self._errors.closed

    async def stop(self) -> None:
        """End the fork server and with it every session; wait until none of them is left."""
        await asyncio.shield(self._begin_to_stop())

    def _begin_to_stop(self) -> asyncio.Task[None]:
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop())
        return self._stopping

    async def _stop(self) -> None:
        self._mark_dead("it was stopped")
        self._close_their_ends()
        if self._running is not None and self._all_gone is not None:
            await self._running.end()  # with it the keepers, with the last of them the obituaries
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_STOP_TIMEOUT_S):
                    await asyncio.shield(self._all_gone)
            asyncio.get_running_loop().remove_reader(self._obituaries)
        self._obituaries.close()
        self._errors.close()
        if self._status is not None:
            self._status.close()

    def _close_their_ends(self) -> None:
        self._their_requests.close()
        self._their_obituaries.close()

    def _send(self, message: dict[str, object], descriptors: list[int]) -> None:
        if self.dead:
            raise SandboxError("the fork server is dead")
        try:
            socket.send_fds(self._requests, [json.dumps(message).encode()], descriptors)
        except OSError as error:
            raise SandboxError(f"the fork server does not take requests: {error}") from error

    def _on_answer(self) -> None:
        try:
            data, ancillary, _, _ = self._requests.recvmsg(_MAX_MESSAGE, CREDENTIALS_SPACE)
        except BlockingIOError:
            return
        except OSError:
            data, ancillary = b"", []
        if not data:
            self._mark_dead(self._last_words())
            return
        message = json.loads(data)
        if message.get("ready"):
            self._on_ready(sender(ancillary))
        elif (answer := self._answers.get(message["id"])) is not None and not answer.done():
            answer.set_result(message["error"])

    def _on_ready(self, pid: int) -> None:
        self._requests.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 0)
        if self._started is None or self._started.done():
            return
        try:
            self._status = ProcessStatus(pid)
        except OSError as error:
            self._started.set_exception(SandboxError(f"the fork server is gone: {error}"))
        else:
            self._started.set_result(None)

    def _on_obituary(self) -> None:
        try:
            data = self._obituaries.recv(_MAX_MESSAGE)
        except BlockingIOError:
            return
        if not data:  # the fork server and every keeper held the other end
            asyncio.get_running_loop().remove_reader(self._obituaries)
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
        asyncio.get_running_loop().remove_reader(self._requests)
        self._requests.close()
        error = SandboxError(f"the fork server died: {reason}")
        if self._started is not None and not self._started.done():
            self._started.set_exception(error)
            self._started.exception()  # seen, even if nobody waits any more
        for death in self._deaths.values():
            if not death.done():
                death.set_result(SERVER_DIED)
        for answer in self._answers.values():
            if not answer.done():
                answer.set_result(str(error))

    def _last_words(self) -> str:
        self._errors.seek(0)
        text = self._errors.read(64_000).decode("utf-8", "backslashreplace").strip()
        return text.splitlines()[-1] if text else "no message"


def _socket_pair() -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    return ours, theirs
