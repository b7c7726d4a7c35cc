"""The host's end of one live interpreter: its control socket, its output, its life.

Everything that arrives here is suspect, for the program can write to the control socket as well as
the interpreter can. Whatever breaks the protocol ends the interpreter.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import select
import signal
import socket
import time
from io import FileIO
from pathlib import Path
from typing import Any

from tir_alp.tools.outcome import Outcome
from tir_alp.tools.sandbox.budget import NOTHING, Resources
from tir_alp.tools.sandbox.config import Lifetime
from tir_alp.tools.sandbox.credentials import CREDENTIALS_SPACE, sender
from tir_alp.tools.sandbox.fork_gate import ForkGate
from tir_alp.tools.sandbox.fork_server import ForkServer
from tir_alp.tools.sandbox.jail import frames
from tir_alp.tools.sandbox.lost import CRASHED, SERVER_DIED, Lost, lost_by
from tir_alp.tools.sandbox.output import HeadTail
from tir_alp.tools.sandbox.process_status import ProcessStatus
from tir_alp.tools.sandbox.result import SandboxError
from tir_alp.tools.sandbox.waiting import readable

_GREETING_TIMEOUT_S = 20.0
_DEATH_TIMEOUT_S = 5.0
_OBITUARY_TIMEOUT_S = 5.0
_CHUNK = 1 << 16
_MAX_REPLY = 16 << 20
_GRACE_S = 0.25
"""After the end of its channel: to die, if that is what it was doing."""


class InterpreterProcess:
    """One interpreter, from its greeting to its death. Made by `start` or `branch`."""

    def __init__(self, server: ForkServer, family: int = 0, gate: ForkGate | None = None) -> None:
        self.lost: Lost | None = None
        self.stdout = self.stderr = HeadTail(1)
        self._max_output_bytes = 1 << 20
        self._server = server
        self._family = family
        self._gate = gate.retain() if gate else None
        self._pid_in_family = 0
        self.pid = 0
        self._pidfd = -1
        self._status: ProcessStatus | None = None
        self._cpu_s = 0.0
        self.num_calls = 0
        self._grace: asyncio.TimerHandle | None = None
        self._was_killed = False
        self._closed = False
        self._frames = frames.FrameReader(_MAX_REPLY)
        self._reply: asyncio.Future[dict[str, Any]] | None = None
        self._control, self._their_control = socket.socketpair()
        self._control.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._control.setblocking(False)
        self._out, self._their_out = _pipe()
        self._err, self._their_err = _pipe()
        server.move_in()

    # ------------------------------------------------------------------ birth

    @classmethod
    async def start(cls, server: ForkServer) -> InterpreterProcess:
        """A fresh interpreter.

        Raises:
            SandboxError: The fork server did not make one.
        """
        process = cls._create(server)
        try:
            async with server.births:
                process._family = server.fork_session(process._their_ends())
                process._close_their_ends()
                (hello,) = await process._greet(with_questions=True)
            process._pid_in_family = hello["pid"]  # no foreign code has run in it so far
            server.death(process._family, process._pid_in_family)
        except BaseException as error:
            await process.kill()
            if isinstance(error, OSError):
                raise SandboxError(f"the session did not start: {error}") from error
            raise
        return process

    async def branch(self) -> InterpreterProcess:
        """An independent copy of this interpreter, which must be idle.

        Raises:
            Lost: The interpreter died before it could be copied.
            SandboxError: It lives, but cannot be copied.
        """
        child = self._create(self._server, self._family, self._gate)
        if self._gate is not None:
            self._gate.permit(self.pid)
        try:
            async with self._server.births:
                async with asyncio.timeout(_GREETING_TIMEOUT_S):
                    await self._fork_into(child)
        except BaseException as error:
            has_forked = self._gate is None or not self._gate.withdraw(self.pid)
            if has_forked and not child._pidfd >= 0:
                self._kill_family()  # somewhere in it runs a copy that nobody holds
            await child.kill()
            if isinstance(error, OSError | TimeoutError | ValueError):
                raise SandboxError(f"the interpreter cannot be forked: {error!r}") from error
            raise
        return child

    @classmethod
    def _create(cls, *arguments: Any) -> InterpreterProcess:
        try:
            return cls(*arguments)
        except OSError as error:
            raise SandboxError(f"no descriptors for another session: {error}") from error

    async def _fork_into(self, child: InterpreterProcess) -> None:
        reply = self._expect_reply()
        await self._send(frames.encode({"id": 0, "op": "branch"}))
        socket.send_fds(self._control, [b"\0"], child._their_ends())
        child._close_their_ends()
        answer = await reply
        if answer.get("error") or not isinstance(answer.get("pid"), int):
            raise SandboxError(f"the interpreter cannot be forked: {answer.get('error')}")
        child._pid_in_family = answer["pid"]
        await child._greet(with_questions=False)
        self._server.death(self._family, child._pid_in_family)
        if child.pid == self.pid:
            raise SandboxError("the interpreter posed as its own branch")
        await self._server.furnish_branch(child._pidfd)
        await child._send(frames.encode({"op": "go"}))

    async def _greet(self, with_questions: bool) -> list[dict[str, Any]]:
        """Wait for the first frame. The kernel vouches for the pid that comes with it."""
        loop = asyncio.get_running_loop()
        try:
            await readable(self._control.fileno(), _GREETING_TIMEOUT_S)
        except TimeoutError:
            raise SandboxError(f"no session within {_GREETING_TIMEOUT_S} s") from None
        space = CREDENTIALS_SPACE + (socket.CMSG_SPACE(4) if with_questions else 0)
        data, ancillary, _, _ = self._control.recvmsg(_CHUNK, space)
        if not data:
            raise SandboxError(f"the session did not start: {self._last_words()}")
        self.pid = sender(ancillary)
        for _, kind, payload in ancillary:
            if kind == socket.SCM_RIGHTS:
                (questions,) = array.array("i", payload)
                self._gate = ForkGate(questions, self._server.jail.max_threads).retain()
        self._pidfd = os.pidfd_open(self.pid)
        self._status = ProcessStatus(self.pid)
        self._control.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 0)
        loop.add_reader(self._control, self._on_control)
        loop.add_reader(self._out, self._on_output, self._out)
        loop.add_reader(self._err, self._on_output, self._err)
        return frames.FrameReader(_MAX_REPLY).feed(data)

    def _their_ends(self) -> list[int]:
        return [end.fileno() for end in (self._their_control, self._their_out, self._their_err)]

    def _close_their_ends(self) -> None:
        for end in (self._their_control, self._their_out, self._their_err):
            end.close()

    def _last_words(self) -> str:
        data = self._err.read(_CHUNK) or b"no message"
        return data.decode("utf-8", "backslashreplace").strip()

    # ------------------------------------------------------------------ life

    def collect(self, stdout: HeadTail, stderr: HeadTail, max_bytes: int) -> None:
        """Where output goes from now on, and how much of it is too much."""
        self.stdout, self.stderr, self._max_output_bytes = stdout, stderr, max_bytes

    async def call(self, message: dict[str, Any]) -> dict[str, Any]:
        """Send a request and wait for its reply. Bring your own deadline.

        Raises:
            Lost: There will be no reply.
        """
        reply = self._expect_reply()
        self.num_calls += 1
        await self._send(frames.encode(message))
        return await reply

    def poll(self) -> None:
        """Notice what happened while nothing was asked: a death, or a frame sent unasked."""
        self._server.poll()
        if self.lost is None and self._server.dead:
            self.lose(Outcome.INFRA_ERROR, "the fork server died")  # it may outlive it by moments
        elif self.lost is None:
            self._on_control()

    def drain(self) -> None:
        """Take what is printed but not yet read."""
        self._on_output(self._out)
        self._on_output(self._err)

    def cpu_s(self) -> float:
        """Processor seconds since its birth, by the kernel's count; the last known once it is dead.

        A crash leaves none to be read between its last call's start and its end.
        """
        if self.lost is None:  # otherwise the pid may be another's by now
            with contextlib.suppress(OSError):
                self._cpu_s = time.clock_gettime(~self.pid << 3 | 2)
        return self._cpu_s

    def measure(self) -> None:
        """Update what is known of its memory and its threads; the last known once it is dead."""
        if self._status is not None:
            self._status.measure()

    @property
    def peak_memory_mb(self) -> float:
        """The most that it has held since its birth, by the last measurement."""
        return self._status.peak_memory_mb if self._status else 0.0

    @property
    def holds(self) -> Resources:
        """What it has taken since its birth, by the last measurement; its keeper counts."""
        if self.lost is not None or self._status is None:
            return NOTHING
        status = self._status
        return Resources(memory_mb=round(status.grown_mb), processes=status.num_threads + 1)

    def worn_out(self, lifetime: Lifetime) -> str:
        """Why it should not be used any longer; empty if it may."""
        if self.lost is not None or self._status is None:
            return ""
        return lifetime.exceeded(self.num_calls, "calls", self._status)

    def _expect_reply(self) -> asyncio.Future[dict[str, Any]]:
        self.poll()
        if self.lost is not None:
            raise self.lost
        self._reply = asyncio.get_running_loop().create_future()
        return self._reply

    async def _send(self, data: bytes) -> None:
        try:
            await asyncio.get_running_loop().sock_sendall(self._control, data)
        except OSError:
            self.lose(Outcome.TOOL_ERROR, CRASHED)

    def _on_control(self) -> None:
        try:
            data = self._control.recv(_CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.lose(Outcome.TOOL_ERROR, CRASHED)
            return
        try:
            for frame in self._frames.feed(data):
                if self._reply is None or self._reply.done() or self._frames.has_rest:
                    raise ValueError("a frame that nobody asked for")
                self._reply.set_result(frame)
        except ValueError as error:
            self.lose(Outcome.TOOL_ERROR, f"it wrote to the sandbox's own channel: {error}")

    def _on_output(self, pipe: FileIO) -> None:
        if self._take_output(pipe):
            self.lose(Outcome.RESOURCE_LIMIT, self._flood)

    def _take_output(self, pipe: FileIO) -> bool:
        """Read what is there; whether it was too much, after which the rest stays unread."""
        sink = self.stdout if pipe is self._out else self.stderr
        while self.lost is None:
            data = pipe.read(_CHUNK)
            if data is None:  # nothing more for now
                return False
            if not data:
                asyncio.get_running_loop().remove_reader(pipe)
                return False
            sink.feed(data)
            if self.stdout.total_bytes + self.stderr.total_bytes > self._max_output_bytes:
                return True
        return False

    @property
    def _flood(self) -> str:
        return f"it printed more than {self._max_output_bytes} bytes"

    # ------------------------------------------------------------------ death

    def lose(self, outcome: Outcome, reason: str) -> None:
        """Give it up: it is killed, and whoever waits for a reply gets `Lost`."""
        if self.lost is not None:
            return
        # Its last words, which may themselves be too many.
        if self._pidfd >= 0 and any(map(self._take_output, (self._out, self._err))):
            outcome, reason = Outcome.RESOURCE_LIMIT, self._flood
        self.measure()
        self.cpu_s()
        self.lost = Lost(outcome, reason)
        loop = asyncio.get_running_loop()
        for end in (self._control, self._out, self._err):
            loop.remove_reader(end)
        if self._pidfd >= 0:
            if reason == CRASHED:  # dead or dying, unless it has only closed its channel
                self._grace = loop.call_later(_GRACE_S, self._end_grace)
            else:
                self._send_kill()
        if self._reply is not None and not self._reply.done():
            self._reply.set_exception(self.lost)
            self._reply.exception()  # seen, even if nobody waits any more

    async def kill(self) -> None:
        """End it, wait until it is dead, free everything. Killing twice is allowed."""
        if self._closed:
            return
        self._closed = True
        self.lose(Outcome.CANCELLED, "the session was closed")
        self._close_their_ends()
        for end in (self._control, self._out, self._err):
            end.close()
        if self._gate is not None:
            self._gate.release()
        if self._grace is not None:
            self._grace.cancel()
        try:
            if self._pidfd >= 0:
                self._send_kill()
                await readable(self._pidfd, _DEATH_TIMEOUT_S)
        except TimeoutError:
            self._kill_family()
        finally:  # even if whoever waits is cancelled
            if self._pidfd >= 0:
                os.close(self._pidfd)
            if self._status is not None:
                self._status.close()
            await self._server.move_out(self._family, self._pid_in_family)

    async def cause_of_death(self) -> Lost:
        """Why it was lost; what a crash was, its keeper tells."""
        assert self.lost is not None
        if self.lost.reason != CRASHED:
            return self.lost
        death = self._server.death(self._family, self._pid_in_family)
        try:
            async with asyncio.timeout(_OBITUARY_TIMEOUT_S):
                end = await asyncio.shield(death)
        except TimeoutError:  # no program can keep it from telling
            self.lost = Lost(Outcome.INFRA_ERROR, "its keeper died")
        else:
            if end is SERVER_DIED:
                self.lost = Lost(Outcome.INFRA_ERROR, "the fork server died")
            else:
                is_filtered = self._server.jail.spec.seccomp != ""
                self.lost = lost_by(end, we_killed=self._was_killed, kills_itself=not is_filtered)
        return self.lost

    def _end_grace(self) -> None:
        death = select.poll()  # not `select`, which takes no descriptor above 1023
        death.register(self._pidfd, select.POLLIN)
        if not death.poll(0):  # it lives: it has closed its channel
            self._send_kill()

    def _send_kill(self) -> None:
        self._was_killed = True
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def _kill_family(self) -> None:
        """End the keeper, and so every process of the session and of its branches.

        Pid 1 of a namespace takes all with it, and cannot be told anything. In a folder, SIGTERM
        makes the keeper kill the others.
        """
        in_namespaces = self._server.jail.spec.room == "namespaces"
        with contextlib.suppress(OSError):
            stat = Path(f"/proc/{self.pid}/stat").read_text()
            keeper = int(stat.rpartition(")")[2].split()[1])
            os.kill(keeper, signal.SIGKILL if in_namespaces else signal.SIGTERM)


def _pipe() -> tuple[FileIO, FileIO]:
    """A pipe whose reading end, the first, does not block."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    return FileIO(reader), FileIO(writer, "w")
