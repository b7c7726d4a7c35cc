"""The host's end of one interpreter, wherever it runs: requests, replies, output and death.

Everything that arrives is suspect, because the program can write to the control channel as well as
the interpreter can. Whatever breaks the protocol ends the interpreter.
"""

from __future__ import annotations

import abc
import asyncio
from typing import Any, Protocol, Self

from tir_alp.tools.outcome import Outcome
from tir_alp.tools.sandbox.config import Growth, Lifetime
from tir_alp.tools.sandbox.endings import CRASHED, Lost
from tir_alp.tools.sandbox.jail import frames
from tir_alp.tools.sandbox.machine.budget import Resources
from tir_alp.tools.sandbox.output import HeadTail

GREETING_TIMEOUT_S = 20.0
DEATH_TIMEOUT_S = 5.0
GRACE_S = 0.25
"""Time to die after its channel has closed, before it is killed."""
_MAX_REPLY = 16 << 20


class Usage(Growth, Protocol):
    """What has been measured of an interpreter's use of the machine."""

    peak_memory_mb: float
    """The most memory that it has held."""

    def measure(self) -> None:
        """Update the values; changes nothing once the interpreter is gone."""
        ...


class Interpreter(abc.ABC):
    """One interpreter, from its greeting to its death."""

    def __init__(self) -> None:
        self.lost: Lost | None = None
        self._usage: Usage | None = None
        self._num_calls = 0
        self._stdout = self._stderr = HeadTail(1)
        self._max_output_bytes = 1 << 20
        self._frames = frames.FrameReader(_MAX_REPLY)
        self._reply: asyncio.Future[dict[str, Any]] | None = None
        self._was_killed = False
        self._closed = False

    @property
    @abc.abstractmethod
    def pid(self) -> int:
        """Its process, or the process of its kernel, as the host numbers it."""

    @abc.abstractmethod
    async def branch(self) -> Self:
        """An independent copy of this interpreter, which must be idle.

        Raises:
            Lost: The interpreter died before it could be copied.
            SandboxError: It lives, but cannot be copied.
        """

    # ------------------------------------------------------------------ life

    def collect(self, stdout: HeadTail, stderr: HeadTail, max_bytes: int) -> None:
        """Set where output goes from now on, and how many bytes are too many."""
        self._stdout, self._stderr, self._max_output_bytes = stdout, stderr, max_bytes

    async def call(self, message: dict[str, Any]) -> dict[str, Any]:
        """Send a request and wait for its reply. The caller sets a deadline.

        Raises:
            Lost: There will be no reply.
        """
        reply = self._expect_reply()
        self._num_calls += 1
        await self._send(message)
        return await reply

    @abc.abstractmethod
    def poll(self) -> None:
        """Notice what happened between requests: a death, or a frame that nobody requested."""

    @abc.abstractmethod
    def drain(self) -> None:
        """Read what was printed but not yet read."""

    @abc.abstractmethod
    def cpu_s(self) -> float:
        """Processor seconds since its birth, counted by the kernel; after its death the last value.

        After a crash, that is the value from before its last call.
        """

    def measure(self) -> None:
        """Measure its use of the machine; changes nothing once it is dead."""
        if self._usage is not None:
            self._usage.measure()

    @property
    def peak_memory_mb(self) -> float:
        """The most memory that it has held since its birth, by the last measurement."""
        return self._usage.peak_memory_mb if self._usage else 0.0

    @property
    @abc.abstractmethod
    def holds(self) -> Resources:
        """The resources that it has taken since its birth, by the last measurement."""

    def worn_out(self, lifetime: Lifetime) -> str:
        """Why it should not be used any longer; empty if it may be."""
        if self.lost is not None or self._usage is None:
            return ""
        return lifetime.exceeded(self._num_calls, "calls", self._usage)

    def _expect_reply(self) -> asyncio.Future[dict[str, Any]]:
        self.poll()
        if self.lost is not None:
            raise self.lost
        self._reply = asyncio.get_running_loop().create_future()
        return self._reply

    @abc.abstractmethod
    async def _send(self, message: dict[str, Any]) -> None: ...

    def _take_control(self, data: bytes) -> None:
        """Handle bytes from its control channel; no bytes are the channel's end."""
        if not data:
            self.lose(Outcome.TOOL_ERROR, CRASHED)
            return
        try:
            for frame in self._frames.feed(data):
                if self._reply is None or self._reply.done() or self._frames.has_rest:
                    raise ValueError("a frame that nobody requested")
                self._reply.set_result(frame)
        except ValueError as error:
            self.lose(Outcome.TOOL_ERROR, f"it wrote to the sandbox's own channel: {error}")

    def _take_output(self, sink: HeadTail, data: bytes) -> bool:
        """Keep what it printed; return whether that was too much."""
        sink.feed(data)
        return self._stdout.total_bytes + self._stderr.total_bytes > self._max_output_bytes

    @property
    def _flood(self) -> str:
        return f"it printed more than {self._max_output_bytes} bytes"

    # ------------------------------------------------------------------ death

    def lose(self, outcome: Outcome, reason: str) -> None:
        """Give it up: it is killed, and the caller who waits for a reply gets `Lost`."""
        if self.lost is not None:
            return
        if self._final_output_is_too_much():
            outcome, reason = Outcome.RESOURCE_LIMIT, self._flood
        self.measure()
        self.cpu_s()
        self.lost = Lost(outcome, reason)
        # After a crash it is dead or dying, unless it has only closed its channel.
        self._end_after(GRACE_S if reason == CRASHED else 0.0)
        if self._reply is not None and not self._reply.done():
            self._reply.set_exception(self.lost)
            self._reply.exception()  # retrieved, even if nobody waits any more

    @abc.abstractmethod
    def _final_output_is_too_much(self) -> bool:
        """Read what was printed but not yet read; return whether that is too much."""

    @abc.abstractmethod
    def _end_after(self, grace_s: float) -> None:
        """Kill it after this time (at once if 0), if it still lives then."""

    async def kill(self) -> None:
        """End it, wait until it is dead, free everything. Killing twice is allowed."""
        if not self._closed:
            self._closed = True
            self.lose(Outcome.CANCELLED, "the session was closed")
            await self._bury()

    @abc.abstractmethod
    async def _bury(self) -> None:
        """Wait until it is dead, and free everything, even if the caller is cancelled."""

    async def cause_of_death(self) -> Lost:
        """Why it was lost; the keeper's report explains a crash."""
        assert self.lost is not None
        if self.lost.reason == CRASHED:
            self.lost = await self._cause_of_crash()
        return self.lost

    @abc.abstractmethod
    async def _cause_of_crash(self) -> Lost: ...
