"""The host's end of one interpreter in a guest: its streams, its life. See `process.py`.

The host cannot see the process itself, which belongs to another kernel. It asks the guest to kill
it, and ends the whole container where the guest does not.
"""

from __future__ import annotations

import asyncio
from typing import Any

from tir_alp.tools.outcome import Outcome
from tir_alp.tools.sandbox.budget import NOTHING, Resources
from tir_alp.tools.sandbox.config import Lifetime
from tir_alp.tools.sandbox.guest import Guest
from tir_alp.tools.sandbox.jail import frames
from tir_alp.tools.sandbox.jail.guest import CONTROL, STDOUT
from tir_alp.tools.sandbox.lost import CRASHED, SERVER_DIED, Death, Lost, lost_by
from tir_alp.tools.sandbox.output import HeadTail
from tir_alp.tools.sandbox.result import SandboxError

_GREETING_TIMEOUT_S = 20.0
_DEATH_TIMEOUT_S = 5.0
_MAX_REPLY = 16 << 20
_MAX_WORDS = 1 << 16
_GRACE_S = 0.25
"""After the end of its channel: to die, if that is what it was doing."""


class GuestProcess:
    """One interpreter, from its greeting to its death. Made by `start` or `branch`."""

    def __init__(self, guest: Guest) -> None:
        self.lost: Lost | None = None
        self.stdout = self.stderr = HeadTail(1)
        self.num_calls = 0
        self._max_output_bytes = 1 << 20
        self._guest = guest
        self._frames = frames.FrameReader(_MAX_REPLY)
        self._reply: asyncio.Future[dict[str, Any]] | None = None
        self._death: asyncio.Future[Death] = asyncio.get_running_loop().create_future()
        self._killer: asyncio.TimerHandle | None = None
        self._was_killed = False
        self._closed = False
        self._number = guest.move_in(self)

    # ------------------------------------------------------------------ birth

    @classmethod
    async def start(cls, guest: Guest) -> GuestProcess:
        """A fresh interpreter.

        Raises:
            SandboxError: The guest did not make one.
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
                words = process.stderr.text()[0].strip()
                raise SandboxError(f"the session did not start: {words or error}") from error
            raise
        return process

    async def branch(self) -> GuestProcess:
        """An independent copy of this interpreter, which must be idle.

        Raises:
            Lost: The interpreter died before it could be copied.
            SandboxError: It lives, but cannot be copied.
        """
        child = GuestProcess(self._guest)
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
            child._write({"op": "go"})
        except BaseException:
            await child.kill()
            raise
        return child

    # ------------------------------------------------------------------ life

    @property
    def pid(self) -> int:
        """Of the guest's kernel, as the host numbers it."""
        return self._guest.pid

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
        self._write(message)
        return await reply

    def poll(self) -> None:
        """Nothing to look at: whatever happens in the guest arrives through the event loop."""

    def drain(self) -> None:
        """Nothing to take: the guest sends what was printed before it sends a reply."""

    def cpu_s(self) -> float:
        """Processor seconds of the container since its start, branches and kernel included."""
        self.measure()
        return self._guest.use.cpu_s if self._guest.use else 0.0

    def measure(self) -> None:
        """Update what is known of the container's memory and time."""
        if self._guest.use is not None:
            self._guest.use.measure()

    @property
    def peak_memory_mb(self) -> float:
        """The most that the container has held, by the last measurement."""
        return self._guest.use.peak_memory_mb if self._guest.use else 0.0

    @property
    def holds(self) -> Resources:
        """Its part of what the container has taken since its start, by the last measurement."""
        return NOTHING if self.lost is not None else self._guest.share()

    def worn_out(self, lifetime: Lifetime) -> str:
        """Why it should not be used any longer; empty if it may."""
        if self.lost is not None or self._guest.use is None:
            return ""
        return lifetime.exceeded(self.num_calls, "calls", self._guest.use)

    def receive(self, stream: int, data: bytes) -> None:
        """See `guest.Resident`."""
        if self.lost is not None:
            return
        if stream == CONTROL:
            self._on_control(data)
            return
        (self.stdout if stream == STDOUT else self.stderr).feed(data)
        if self.stdout.total_bytes + self.stderr.total_bytes > self._max_output_bytes:
            reason = f"it printed more than {self._max_output_bytes} bytes"
            self.lose(Outcome.RESOURCE_LIMIT, reason)

    def _on_control(self, data: bytes) -> None:
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

    def _expect_reply(self) -> asyncio.Future[dict[str, Any]]:
        if self._guest.dead:
            self.lose(Outcome.TOOL_ERROR, CRASHED)
        if self.lost is not None:
            raise self.lost
        self._reply = asyncio.get_running_loop().create_future()
        return self._reply

    def _write(self, message: dict[str, Any]) -> None:
        self._guest.send("write", self._number, frames.encode(message))

    # ------------------------------------------------------------------ death

    def lose(self, outcome: Outcome, reason: str) -> None:
        """Give it up: it is killed, and whoever waits for a reply gets `Lost`."""
        if self.lost is not None:
            return
        self.measure()
        self.lost = Lost(outcome, reason)
        if not self._death.done():
            # Dead or dying if it has crashed, unless it has only closed its channel.
            grace_s = _GRACE_S if reason == CRASHED else 0.0
            self._killer = asyncio.get_running_loop().call_later(grace_s, self._kill)
        if self._reply is not None and not self._reply.done():
            self._reply.set_exception(self.lost)
            self._reply.exception()  # seen, even if nobody waits any more

    def bury(self, death: Death) -> None:
        """See `guest.Resident`."""
        if not self._death.done():
            self._death.set_result(death)
        if self._killer is not None:
            self._killer.cancel()
        self.lose(Outcome.TOOL_ERROR, CRASHED)

    async def kill(self) -> None:
        """End it, wait until it is dead, free everything. Killing twice is allowed."""
        if self._closed:
            return
        self._closed = True
        self.lose(Outcome.CANCELLED, "the session was closed")
        try:
            if self._guest.has_others:
                self._guest.send("kill", self._number)
                async with asyncio.timeout(_DEATH_TIMEOUT_S):
                    await asyncio.shield(self._death)
        except TimeoutError:
            await self._guest.stop()
        finally:  # even if whoever waits is cancelled
            if self._killer is not None:
                self._killer.cancel()
            await self._guest.move_out(self._number)

    async def cause_of_death(self) -> Lost:
        """Why it was lost; what a crash was, its keeper tells, or the engine."""
        assert self.lost is not None
        if self.lost.reason != CRASHED:
            return self.lost
        death = await asyncio.shield(self._death)  # `_kill` has a deadline, and the last word
        if death is SERVER_DIED:
            self.lost = await self._guest.cause_of_end()
        else:
            self.lost = lost_by(death, we_killed=self._was_killed, kills_itself=False)
        return self.lost

    def _kill(self) -> None:
        """By the guest, and if that is of no use, with the guest."""
        self._was_killed = True
        self._guest.send("kill", self._number)
        loop = asyncio.get_running_loop()
        verdict = Lost(Outcome.RESOURCE_LIMIT, "nothing answers in its container any more")
        self._killer = loop.call_later(_DEATH_TIMEOUT_S / 2, self._guest.give_up, verdict)


async def _in_time(reply: asyncio.Future[dict[str, Any]]) -> dict[str, Any]:
    try:
        async with asyncio.timeout(_GREETING_TIMEOUT_S):
            return await reply
    except TimeoutError:
        raise SandboxError(f"no session within {_GREETING_TIMEOUT_S:g} s") from None
