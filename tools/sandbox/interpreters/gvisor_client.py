"""The host's end of a guest: a container with its own kernel, for a session and its branches.

One stream of bytes goes to and from `jail/gvisor_relay.py`. Limits and clocks are read from the
container's control groups, which no guest can touch. A guest is trusted with nothing but its own
session: whatever it sends is checked here. `GuestHost` in `in_gvisor.py` is this client together
with the interpreters in the guest.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import itertools
import os
import secrets
import socket
from typing import Any, Protocol

from tir_alp.tools.outcome import Outcome
from tir_alp.tools.sandbox.config import Lifetime
from tir_alp.tools.sandbox.endings import SERVER_DIED, Death, Lost
from tir_alp.tools.sandbox.interpreters.container_stream import (
    STDOUT,
    ContainerStream,
    last_line,
)
from tir_alp.tools.sandbox.jail import container_entry as entry
from tir_alp.tools.sandbox.jail import frames
from tir_alp.tools.sandbox.jail import gvisor_relay as protocol
from tir_alp.tools.sandbox.jail.seal import Seal
from tir_alp.tools.sandbox.jail.spec import JailSpec
from tir_alp.tools.sandbox.machine.budget import NOTHING, Resources
from tir_alp.tools.sandbox.machine.usage import ContainerUsage
from tir_alp.tools.sandbox.result import SandboxError, SandboxRefused

_START_TIMEOUT_S = 120.0
_KEY_BYTES = 32
_CHUNK = 1 << 18
_MAX_FRAME = 1 << 20
_MAX_STDERR = 64_000
_PROCESSES = 16
"""Threads on the host of an idle interpreter and its share of the guest's kernel, roughly."""


class OpenContainer(Protocol):
    """A container that runs, and the stream to it."""

    @property
    def stream(self) -> socket.socket:
        """To its stdin, and from its stdout and stderr as a `ContainerStream`; does not block.

        Closing it ends the container.
        """
        ...

    @property
    def pid(self) -> int:
        """The process of its kernel, as the host numbers it; 0 if that has ended already."""
        ...

    def remove(self) -> None:
        """Kill and remove the container; wait until it is gone."""
        ...

    def cause_of_end(self) -> Lost:
        """Why the container ended by itself, according to the container engine."""
        ...


class GuestJail(Protocol):
    """What a guest needs to know about its jail."""

    @property
    def image(self) -> str:
        """Name of the container's image."""
        ...

    @property
    def spec(self) -> JailSpec:
        """What the session may do; sent to the guest."""
        ...

    def open(self) -> OpenContainer:
        """Start a container. Blocks.

        Raises:
            SandboxError: The container engine does not start it.
        """
        ...


class Resident(Protocol):
    """An interpreter in the guest; see `in_gvisor.py`."""

    def receive(self, stream: int, data: bytes) -> None:
        """Take bytes from its control socket, stdout or stderr."""
        ...

    def bury(self, death: Death) -> None:
        """Take note that it has ended."""
        ...


class Guest:
    """A live container. Once it is `dead` it stays dead: start another."""

    def __init__(self, jail: GuestJail) -> None:
        self.jail = jail
        self.dead = False
        self.stopped = False
        self.usage: ContainerUsage | None = None
        """None until it has started."""
        self._numbers = itertools.count(1)
        self._residents: dict[int, Resident] = {}
        self._opening: asyncio.Task[OpenContainer] | None = None
        self._container: OpenContainer | None = None
        self._awaited: asyncio.Future[dict[str, Any]] | None = None
        self._pieces = ContainerStream()
        self._from_guest: Seal | None = None
        self._to_guest: Seal | None = None
        self._frames = frames.FrameReader(_MAX_FRAME)
        self._stderr = bytearray()
        self._outbox = bytearray()
        self._verdict: Lost | None = None
        self._stopping: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """See `InterpreterHost`."""
        self._opening = asyncio.create_task(asyncio.to_thread(self.jail.open))
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                self._container = opened = await asyncio.shield(self._opening)
                asyncio.get_running_loop().add_reader(opened.stream, self._on_stream)
                self._check(await self._message())
                await self._introduce()
        except BaseException as error:
            await self.stop()
            if isinstance(error, TimeoutError):
                late = f"the container was not ready within {_START_TIMEOUT_S:g} s"
                raise SandboxError(late) from None
            raise

    async def _introduce(self) -> None:
        """Send the guest its spec and a key, and wait until it is ready."""
        key = secrets.token_bytes(_KEY_BYTES)
        spec = dataclasses.asdict(self.jail.spec)
        self._from_guest, self._to_guest = Seal(key, protocol.GUEST), Seal(key, protocol.HOST)
        self._put(frames.encode({"spec": spec, "key": key.hex()}))
        await self._message()

    def _check(self, hello: dict[str, Any]) -> None:
        assert self._container is not None
        if hello["code"] != entry.fingerprint():
            raise SandboxRefused(
                f"the image {self.jail.image} was built from another version of this "
                "code: build it again"
            )
        breaches = dict(hello["breaches"])
        if hello["kernel"] == [os.uname().release, os.uname().version]:
            breaches["container's kernel"] = "is the host's"
        self.usage = ContainerUsage(self._container.pid)
        breaches |= {f"container's {what}": "no limit" for what in self.usage.unlimited()}
        if breaches:
            listing = "; ".join(f"{promise} ({got})" for promise, got in breaches.items())
            raise SandboxRefused(f"the container does not hold: {listing}")

    @property
    def pid(self) -> int:
        """The process of the guest's kernel, as the host numbers it."""
        return self._container.pid if self._container else 0

    def send(self, op: str, number: int, data: bytes = b"", to: int = 0) -> None:
        """Tell the guest to do something with one interpreter; see `jail/gvisor_relay.py`.

        Args:
            op: "start", "branch", "write" or "kill".
            number: The interpreter.
            data: Bytes for its control socket.
            to: The number that its branch gets.
        """
        if not self.dead and self._to_guest is not None:
            text = base64.b64encode(data).decode()
            self._put(self._to_guest.close({"op": op, "n": number, "to": to, "data": text}))

    def move_in(self, resident: Resident) -> int:
        """Take in one interpreter, born or about to be; return its number."""
        number = next(self._numbers)
        self._residents[number] = resident
        return number

    async def move_out(self, number: int) -> None:
        """Forget one interpreter; the container ends with the last."""
        self._residents.pop(number, None)
        if not self._residents:
            await self.stop()

    @property
    def has_others(self) -> bool:
        """Whether more than one interpreter depends on it."""
        return len(self._residents) > 1

    def share(self) -> Resources:
        """What one of its interpreters has taken since the start, if each has taken the same."""
        if self.dead or self.usage is None:
            return NOTHING
        grown_mb = self.usage.grown_mb / max(1, len(self._residents))
        return Resources(memory_mb=round(grown_mb), processes=_PROCESSES)

    def worn_out(self, lifetime: Lifetime) -> str:
        """Always empty: a guest serves one session and ends with it."""
        return ""

    async def vacated(self) -> None:
        """Return at once: a guest is never retired."""

    async def stop(self) -> None:
        """See `InterpreterHost`."""
        await asyncio.shield(self.begin_to_stop())

    def begin_to_stop(self) -> asyncio.Task[None]:
        """Begin to `stop`, without waiting."""
        if self._stopping is None:
            self._mark_dead()
            self._stopping = asyncio.create_task(self._stop())
        return self._stopping

    def give_up(self, verdict: Lost) -> None:
        """End the container because of something that a program in it has done."""
        if not self.dead:
            self._verdict = verdict
            self.begin_to_stop()

    async def cause_of_end(self) -> Lost:
        """The reason why the container ended."""
        if self._verdict is not None:
            return self._verdict
        if self._container is None:
            return Lost(Outcome.INFRA_ERROR, "the container did not start")
        return await asyncio.to_thread(self._container.cause_of_end)

    async def _stop(self) -> None:
        if self._opening is not None:
            await asyncio.gather(self._opening, return_exceptions=True)
            if not self._opening.cancelled() and self._opening.exception() is None:
                opened = self._opening.result()
                opened.stream.close()  # otherwise the engine waits for somebody to read it
                await asyncio.to_thread(opened.remove)
        self.stopped = True

    async def _message(self) -> dict[str, Any]:
        """Wait for the next message that is not about an interpreter."""
        self._awaited = asyncio.get_running_loop().create_future()
        if self.dead:
            raise SandboxError(f"the container ended: {last_line(self._stderr)}")
        return await self._awaited

    def _put(self, data: bytes) -> None:
        self._outbox += data
        self._flush()

    def _flush(self) -> None:
        assert self._container is not None
        loop, stream = asyncio.get_running_loop(), self._container.stream
        try:
            del self._outbox[: stream.send(self._outbox)]
        except BlockingIOError:
            pass
        except OSError:  # it has ended, which `_on_stream` will notice
            self._outbox.clear()
        if self._outbox:
            loop.add_writer(stream, self._flush)
        else:
            loop.remove_writer(stream)

    def _on_stream(self) -> None:
        assert self._container is not None
        try:
            data = self._container.stream.recv(_CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._mark_dead()
            return
        try:
            self._take(data)
        except (ValueError, KeyError, TypeError) as error:  # the program has taken the guest over
            self.give_up(
                Lost(Outcome.TOOL_ERROR, f"it wrote to the sandbox's own channel: {error}")
            )

    def _take(self, data: bytes) -> None:
        for stream, piece in self._pieces.feed(data):
            if stream != STDOUT:
                self._stderr = (self._stderr + piece)[-_MAX_STDERR:]
                continue
            for frame in self._frames.feed(piece):
                self._deliver(self._from_guest.open(frame) if self._from_guest else frame)

    def _deliver(self, message: dict[str, Any]) -> None:
        if "n" not in message:
            if self._awaited is not None and not self._awaited.done():
                self._awaited.set_result(message)
            return
        resident = self._residents.get(message["n"])
        if resident is None:
            return
        if "stream" in message:
            resident.receive(message["stream"], base64.b64decode(message["data"]))
        else:
            resident.bury(Death(message["status"], message["limit"]))

    def _mark_dead(self) -> None:
        if self.dead:
            return
        self.dead = True
        if self._container is not None:
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._container.stream)
            loop.remove_writer(self._container.stream)
        if self._awaited is not None and not self._awaited.done():
            error = SandboxError(f"the container ended: {last_line(self._stderr)}")
            self._awaited.set_exception(error)
            self._awaited.exception()  # retrieved, even if nobody waits any more
        for resident in tuple(self._residents.values()):
            resident.bury(SERVER_DIED)
