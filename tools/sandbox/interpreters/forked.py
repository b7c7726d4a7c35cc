"""An interpreter that is a process of this machine: its control socket, its pipes and its pidfd.

`in_gvisor.py` has the other kind.
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
from tir_alp.tools.sandbox.endings import CRASHED, SERVER_DIED, Lost, lost_by
from tir_alp.tools.sandbox.interpreters.descriptors import readable
from tir_alp.tools.sandbox.interpreters.fork_gate import ForkGate
from tir_alp.tools.sandbox.interpreters.fork_server_client import ForkServer
from tir_alp.tools.sandbox.interpreters.interpreter import (
    DEATH_TIMEOUT_S,
    GREETING_TIMEOUT_S,
    Interpreter,
)
from tir_alp.tools.sandbox.jail import frames
from tir_alp.tools.sandbox.jail.credentials import CREDENTIALS_SPACE, sender
from tir_alp.tools.sandbox.machine.budget import NOTHING, Resources
from tir_alp.tools.sandbox.machine.usage import ProcessUsage
from tir_alp.tools.sandbox.result import SandboxError

_OBITUARY_TIMEOUT_S = 5.0
_CHUNK = 1 << 16
_MAX_READS = 16
"""Reads at one go: more than a pipe holds, so that a flood cannot keep the event loop busy."""


class ForkedInterpreter(Interpreter):
    """An interpreter that a fork server has forked, or a branch of one."""

    def __init__(self, server: ForkServer, family: int = 0, gate: ForkGate | None = None) -> None:
        super().__init__()
        self._server = server
        self._family = family
        self._gate = gate.retain() if gate else None
        self._pid_in_family = 0
        self._pid = 0
        self._pidfd = -1
        self._process_usage: ProcessUsage | None = None
        self._cpu_s = 0.0
        self._grace: asyncio.TimerHandle | None = None
        self._control, self._their_control = socket.socketpair()
        self._control.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._control.setblocking(False)
        self._out, self._their_out = _pipe()
        self._err, self._their_err = _pipe()
        server.move_in()

    # ------------------------------------------------------------------ birth

    @classmethod
    async def fork_from(cls, server: ForkServer) -> ForkedInterpreter:
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
            process._pid_in_family = hello["pid"]  # trusted: no foreign code has run in it yet
            server.death(process._family, process._pid_in_family)
        except BaseException as error:
            await process.kill()
            if isinstance(error, OSError):
                raise SandboxError(f"the session did not start: {error}") from error
            raise
        return process

    async def branch(self) -> ForkedInterpreter:
        """See `Interpreter`."""
        child = self._create(self._server, self._family, self._gate)
        if self._gate is not None:
            self._gate.permit(self.pid)
        try:
            async with self._server.births:
                async with asyncio.timeout(GREETING_TIMEOUT_S):
                    await self._fork_into(child)
        except BaseException as error:
            has_forked = self._gate is None or not self._gate.withdraw(self.pid)
            if has_forked and not child._pidfd >= 0:
                self._kill_family()  # otherwise a copy that nobody holds would run on
            await child.kill()
            if isinstance(error, OSError | TimeoutError | ValueError):
                raise SandboxError(f"the interpreter cannot be forked: {error!r}") from error
            raise
        return child

    @classmethod
    def _create(cls, *arguments: Any) -> ForkedInterpreter:
        try:
            return cls(*arguments)
        except OSError as error:
            raise SandboxError(f"no descriptors for another session: {error}") from error

    async def _fork_into(self, child: ForkedInterpreter) -> None:
        reply = self._expect_reply()
        await self._send({"id": 0, "op": "branch"})
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
        await child._send({"op": "go"})

    async def _greet(self, with_questions: bool) -> list[dict[str, Any]]:
        """Wait for the first frame. The kernel vouches for the pid that arrives with it."""
        loop = asyncio.get_running_loop()
        try:
            await readable(self._control.fileno(), GREETING_TIMEOUT_S)
        except TimeoutError:
            raise SandboxError(f"no session within {GREETING_TIMEOUT_S} s") from None
        space = CREDENTIALS_SPACE + (socket.CMSG_SPACE(4) if with_questions else 0)
        data, ancillary, _, _ = self._control.recvmsg(_CHUNK, space)
        if not data:
            raise SandboxError(f"the session did not start: {self._last_words()}")
        self._pid = sender(ancillary)
        for _, kind, payload in ancillary:
            if kind == socket.SCM_RIGHTS:
                (questions,) = array.array("i", payload)
                self._gate = ForkGate(questions, self._server.jail.max_threads).retain()
        self._pidfd = os.pidfd_open(self.pid)
        self._usage = self._process_usage = ProcessUsage(self.pid)
        self._control.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 0)
        loop.add_reader(self._control, self._on_control)
        loop.add_reader(self._out, self._on_output, self._out)
        loop.add_reader(self._err, self._on_output, self._err)
        return frames.FrameReader(_CHUNK).feed(data)

    def _their_ends(self) -> list[int]:
        return [end.fileno() for end in (self._their_control, self._their_out, self._their_err)]

    def _close_their_ends(self) -> None:
        for end in (self._their_control, self._their_out, self._their_err):
            end.close()

    def _last_words(self) -> str:
        data = self._err.read(_CHUNK) or b"no message"
        return data.decode("utf-8", "backslashreplace").strip()

    # ------------------------------------------------------------------ life

    @property
    def pid(self) -> int:
        """See `Interpreter`."""
        return self._pid

    def poll(self) -> None:
        """See `Interpreter`."""
        self._server.poll()
        if self.lost is None and self._server.dead:
            # The interpreter may outlive it by moments.
            self.lose(Outcome.INFRA_ERROR, "the fork server died")
        elif self.lost is None:
            self._on_control()

    def drain(self) -> None:
        """See `Interpreter`."""
        self._on_output(self._out)
        self._on_output(self._err)

    def cpu_s(self) -> float:
        """See `Interpreter`."""
        if self.lost is None:  # otherwise another process may have the pid by now
            with contextlib.suppress(OSError):
                self._cpu_s = time.clock_gettime(~self.pid << 3 | 2)
        return self._cpu_s

    @property
    def holds(self) -> Resources:
        """See `Interpreter`; its keeper is included."""
        if self.lost is not None or self._process_usage is None:
            return NOTHING
        usage = self._process_usage
        return Resources(memory_mb=round(usage.grown_mb), processes=usage.num_threads + 1)

    async def _send(self, message: dict[str, Any]) -> None:
        try:
            await asyncio.get_running_loop().sock_sendall(self._control, frames.encode(message))
        except OSError:
            self.lose(Outcome.TOOL_ERROR, CRASHED)

    def _on_control(self) -> None:
        try:
            data = self._control.recv(_CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self._take_control(data)

    def _on_output(self, pipe: FileIO) -> None:
        if self._floods(pipe):
            self.lose(Outcome.RESOURCE_LIMIT, self._flood)

    def _floods(self, pipe: FileIO) -> bool:
        """Read what the pipe holds, up to the limit; return whether that was exceeded."""
        sink = self._stdout if pipe is self._out else self._stderr
        for _ in range(_MAX_READS):
            if self.lost is not None:
                break
            data = pipe.read(_CHUNK)
            if data is None:  # nothing more for now
                return False
            if not data:
                asyncio.get_running_loop().remove_reader(pipe)
                return False
            if self._take_output(sink, data):
                return True
        return False

    # ------------------------------------------------------------------ death

    def _final_output_is_too_much(self) -> bool:
        return self._pidfd >= 0 and any(map(self._floods, (self._out, self._err)))

    def _end_after(self, grace_s: float) -> None:
        loop = asyncio.get_running_loop()
        for end in (self._control, self._out, self._err):
            loop.remove_reader(end)
        if self._pidfd < 0:
            return
        if grace_s:
            self._grace = loop.call_later(grace_s, self._end_grace)
        else:
            self._send_kill()

    async def _bury(self) -> None:
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
                await readable(self._pidfd, DEATH_TIMEOUT_S)
        except TimeoutError:
            self._kill_family()
        finally:  # even if the caller is cancelled
            if self._pidfd >= 0:
                os.close(self._pidfd)
            if self._process_usage is not None:
                self._process_usage.close()
            await self._server.move_out(self._family, self._pid_in_family)

    async def _cause_of_crash(self) -> Lost:
        death = self._server.death(self._family, self._pid_in_family)
        try:
            async with asyncio.timeout(_OBITUARY_TIMEOUT_S):
                end = await asyncio.shield(death)
        except TimeoutError:  # no program can keep the keeper from reporting
            return Lost(Outcome.INFRA_ERROR, "its keeper died")
        if end is SERVER_DIED:
            return Lost(Outcome.INFRA_ERROR, "the fork server died")
        is_filtered = self._server.jail.spec.seccomp != ""
        return lost_by(end, we_killed=self._was_killed, kills_itself=not is_filtered)

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
        """End the keeper, and with it every process of the session and of its branches.

        As pid 1 of a namespace the keeper handles no signal, and its death ends all the others.
        In a folder, SIGTERM makes it kill the others.
        """
        in_namespaces = self._server.jail.spec.room == "namespaces"
        with contextlib.suppress(OSError):
            stat = Path(f"/proc/{self.pid}/stat").read_text()
            keeper = int(stat.rpartition(")")[2].split()[1])
            os.kill(keeper, signal.SIGKILL if in_namespaces else signal.SIGTERM)


class ForkServerHost(ForkServer):
    """A fork server and the interpreters that it makes; see `InterpreterHost`."""

    async def new_interpreter(self) -> ForkedInterpreter:
        """See `InterpreterHost`."""
        return await ForkedInterpreter.fork_from(self)


def _pipe() -> tuple[FileIO, FileIO]:
    """A pipe whose reading end, the first, does not block."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    return FileIO(reader), FileIO(writer, "w")
