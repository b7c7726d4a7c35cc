"""An interpreter in a guest: its streams and its end. `forked.py` has the other kind.

The host cannot see the process itself, which belongs to another kernel. It asks the guest to kill
the process, and ends the whole container if the guest does not.
"""

from __future__ import annotations

import asyncio
from typing import Any

from tir_alp.tools.outcome import Outcome
from tir_alp.tools.sandbox.endings import CRASHED, SERVER_DIED, Death, Lost, lost_by
from tir_alp.tools.sandbox.interpreters.gvisor_client import Guest
from tir_alp.tools.sandbox.interpreters.interpreter import (
    DEATH_TIMEOUT_S,
    GREETING_TIMEOUT_S,
    Interpreter,
)
from tir_alp.tools.sandbox.jail import frames
from tir_alp.tools.sandbox.jail.gvisor_relay import CONTROL, STDOUT
from tir_alp.tools.sandbox.machine.budget import NOTHING, Resources
from tir_alp.tools.sandbox.output import HeadTail
from tir_alp.tools.sandbox.result import SandboxError

_MAX_WORDS = 1 << 16


class GuestInterpreter(Interpreter):
    """An interpreter that a guest has started, or a branch of one."""

    def __init__(self, guest: Guest) -> None:
        super().__init__()
        self._guest = guest
        self._usage = guest.usage
        self._death: asyncio.Future[Death] = asyncio.get_running_loop().create_future()
        self._killer: asyncio.TimerHandle | None = None
        self._number = guest.move_in(self)

    # ------------------------------------------------------------------ birth

    @classmethod
    async def start_in(cls, guest: Guest) -> GuestInterpreter:
        """A fresh interpreter.

        Raises:
            SandboxError: The guest did not start one.
        """
        process = cls(guest)
        try:
            process.collect(HeadTail(_MAX_WORDS), HeadTail(_MAX_WORDS), _MAX_WORDS)
            greeting = process._expect_reply()
            guest.send("start", process._number)
            await _in_time(greeting)
        except BaseException as error:
            await process.kill()
            if isinstance(error, Lost):
                words = process._stderr.text()[0].strip()
                raise SandboxError(f"the session did not start: {words or error}") from error
            raise
        return process

    async def branch(self) -> GuestInterpreter:
        """See `Interpreter`."""
        child = GuestInterpreter(self._guest)
        try:
            reply, greeting = self._expect_reply(), child._expect_reply()
            frame = frames.encode({"id": 0, "op": "branch"})
            self._guest.send("branch", self._number, frame, to=child._number)
            answer = await _in_time(reply)
            if answer.get("error") or not isinstance(answer.get("pid"), int):
                raise SandboxError(f"the interpreter cannot be forked: {answer.get('error')}")
            try:
                await _in_time(greeting)
            except Lost as error:
                raise SandboxError("the interpreter's copy died at once") from error
            await child._send({"op": "go"})
        except BaseException:
            await child.kill()
            raise
        return child

    # ------------------------------------------------------------------ life

    @property
    def pid(self) -> int:
        """The process of the guest's kernel."""
        return self._guest.pid

    def poll(self) -> None:
        """See `Interpreter`. Everything else about the guest arrives through the event loop."""
        if self._guest.dead:
            self.lose(Outcome.TOOL_ERROR, CRASHED)

    def drain(self) -> None:
        """Do nothing: the guest sends what was printed before it sends a reply."""

    def cpu_s(self) -> float:
        """Processor seconds of the container since its start, branches and kernel included."""
        self.measure()
        return self._guest.usage.cpu_s if self._guest.usage else 0.0

    @property
    def holds(self) -> Resources:
        """Its share of what the container has taken since its start, by the last measurement."""
        return NOTHING if self.lost is not None else self._guest.share()

    def receive(self, stream: int, data: bytes) -> None:
        """See `Resident`."""
        if self.lost is not None:
            return
        if stream == CONTROL:
            self._take_control(data)
        elif self._take_output(self._stdout if stream == STDOUT else self._stderr, data):
            self.lose(Outcome.RESOURCE_LIMIT, self._flood)

    async def _send(self, message: dict[str, Any]) -> None:
        self._guest.send("write", self._number, frames.encode(message))

    # ------------------------------------------------------------------ death

    def bury(self, death: Death) -> None:
        """See `Resident`."""
        if not self._death.done():
            self._death.set_result(death)
        if self._killer is not None:
            self._killer.cancel()
        self.lose(Outcome.TOOL_ERROR, CRASHED)

    def _final_output_is_too_much(self) -> bool:
        return False  # all output has arrived already

    def _end_after(self, grace_s: float) -> None:
        if not self._death.done():
            self._killer = asyncio.get_running_loop().call_later(grace_s, self._kill)

    async def _bury(self) -> None:
        try:
            if self._guest.has_others:
                self._guest.send("kill", self._number)
                async with asyncio.timeout(DEATH_TIMEOUT_S):
                    await asyncio.shield(self._death)
        except TimeoutError:
            await self._guest.stop()
        finally:  # even if the caller is cancelled
            if self._killer is not None:
                self._killer.cancel()
            await self._guest.move_out(self._number)

    async def _cause_of_crash(self) -> Lost:
        death = await asyncio.shield(self._death)  # `_kill` has a deadline of its own
        if death is SERVER_DIED:
            return await self._guest.cause_of_end()
        return lost_by(death, we_killed=self._was_killed, kills_itself=False)

    def _kill(self) -> None:
        """Have the guest kill it; if that does not help, end the guest."""
        self._was_killed = True
        self._guest.send("kill", self._number)
        loop = asyncio.get_running_loop()
        verdict = Lost(Outcome.RESOURCE_LIMIT, "nothing answers in its container any more")
        self._killer = loop.call_later(DEATH_TIMEOUT_S / 2, self._guest.give_up, verdict)


class GuestHost(Guest):
    """A guest and the interpreters in it; see `InterpreterHost`."""

    async def new_interpreter(self) -> GuestInterpreter:
        """See `InterpreterHost`."""
        return await GuestInterpreter.start_in(self)


async def _in_time(reply: asyncio.Future[dict[str, Any]]) -> dict[str, Any]:
    try:
        async with asyncio.timeout(GREETING_TIMEOUT_S):
            return await reply
    except TimeoutError:
        raise SandboxError(f"no session within {GREETING_TIMEOUT_S:g} s") from None
