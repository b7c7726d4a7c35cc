"""One place in the cluster, and the actor in it: watched, and replaced when it dies or hangs.

An actor counts as lost when its process is gone, or when it does not answer a heartbeat in time. It
is then killed, whatever it does, and calls that wait for it fail with `RoleLost`. Another one is
started in its place, again and again, for a node may come back. All of it is in the event loop of
the run; only `report_suspicion` may be called from other threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from tir_alp.cluster.config import ClusterConfig
from tir_alp.roles import RoleLost

Make = Callable[[], Any]
"""Makes an actor, which need not be there yet."""

_MAX_PAUSE_S = 60.0  # between two starts that failed


class WatchedActor:
    """A place for an actor.

    Args:
        name: For people, such as "engine-1".
        make: Makes the actor.
        start: Makes it ready for work, e.g. loads a model.
        config: Deadlines.
        log: Told, in a sentence, what happens to it.
        is_replaced: Whether another actor takes the place of one that is lost.
    """

    def __init__(
        self,
        name: str,
        make: Make,
        start: Callable[[Any], Awaitable[None]],
        config: ClusterConfig,
        log: Callable[[str], None],
        is_replaced: bool = True,
    ) -> None:
        self.name, self.num_replaced = name, 0
        self.generation = 0
        """Actors that were lost here; rises when it is known."""
        self.health: Mapping[str, Any] = {}
        """What the last heartbeat of the actor said, its `pid` too; empty before the first."""
        self._make, self._start, self._config, self._log = make, start, config, log
        self._is_replaced = is_replaced
        self._actor: Any = None
        self._doubted: Any = None
        self._loop = asyncio.get_running_loop()
        self._doubts: asyncio.Queue[tuple[Any, str]] = asyncio.Queue()
        self._watcher: asyncio.Task[None] | None = None

    @property
    def actor(self) -> Any:
        """The actor; None while there is none that works, from the first doubt on."""
        return None if self._actor is self._doubted else self._actor

    async def open(self) -> None:
        """Start the first actor. Raises what its start raises, and RoleLost if it dies in it."""
        await self._begin()
        self._watcher = asyncio.create_task(self._watch(), name=f"watching {self.name}")

    async def close(self) -> None:
        """End the actor."""
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        actor, self._actor = self._actor, None
        if actor is not None:
            kill(actor)

    async def call(self, method: str, *arguments: Any, timeout_s: float) -> Any:
        """Call a method of the actor; cancelled, the call is cancelled there too.

        Raises:
            RoleLost: There is no actor, or it died.
            TimeoutError: It did not answer in time.
        """
        actor = self.actor
        if actor is None:
            raise RoleLost(f"{self.name} is not there yet: it is being replaced")
        answer = getattr(actor, method).remote(*arguments)
        try:
            async with asyncio.timeout(timeout_s):
                return await wait_for(answer)
        except RayActorError as error:
            raise self.report_suspicion(actor, reason_of(error)) from error
        except RayTaskError as error:
            raise error.cause from None  # what the method raised
        except BaseException:
            with contextlib.suppress(RayError, TypeError):  # a thread cannot be cancelled
                ray.cancel(answer)
            raise

    def relay_log(self, health: Mapping[str, Any]) -> None:
        """Take note of a heartbeat; what is `said` in it is told."""
        self.health = {name: value for name, value in health.items() if name != "said"}
        for text in health.get("said", ()):
            self._log(f"{self.name}: {text}")

    def report_suspicion(self, actor: Any, reason: str) -> RoleLost:
        """Have an actor replaced, unless it has been; returns what to raise. From any thread."""
        if actor is self._actor:
            self._doubted = actor
        with contextlib.suppress(RuntimeError):  # the run has ended
            self._loop.call_soon_threadsafe(self._doubts.put_nowait, (actor, reason))
        return RoleLost(f"{self.name} was lost: {reason}")

    # -------------------------------------------------------------------------- watching

    async def _watch(self) -> None:
        """Consumes doubts and heartbeats; ends with the part, or with an actor for good."""
        while self._actor is not None:
            reason = await self._next_doubt() or await self._ask()
            if reason:
                await self._replace(reason)

    async def _next_doubt(self) -> str:
        """Wait for a doubt about the actor, no longer than until the next heartbeat is due."""
        try:
            async with asyncio.timeout(self._config.heartbeat_s):
                while True:
                    actor, reason = await self._doubts.get()
                    if actor is self._actor:
                        return reason
        except TimeoutError:
            return ""

    async def _ask(self) -> str:
        """Ask the actor how it is; returns why it has to be replaced, if so."""
        patience_s = self._config.patience_s
        try:
            async with asyncio.timeout(patience_s):
                self.relay_log(await wait_for(self._actor.heartbeat.remote()))
        except TimeoutError:
            return f"it has not answered for {patience_s:g} s"
        except RayError as error:
            return reason_of(error)
        return ""

    async def _replace(self, reason: str) -> None:
        actor, self._actor = self._actor, None
        self.generation += 1
        self.health = {}
        kill(actor)
        if not self._is_replaced:
            self._log(f"{self.name} was lost: {reason}")
            return
        self._log(f"{self.name} is replaced: {reason}")
        pause_s = 0.1
        while self._actor is None:
            try:
                await self._begin()
            except Exception as error:  # whatever it is: it is said, and it may pass
                self._log(f"{self.name} could not be started: {error}; again in {pause_s:g} s")
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _MAX_PAUSE_S)
        self.num_replaced += 1
        self._log(f"{self.name} is back")

    async def _begin(self) -> None:
        """Make an actor and start it; one that does not start is killed."""
        actor = self._make()
        try:
            async with asyncio.timeout(self._config.start_timeout_s):
                await self._start(actor)
        except RayActorError as error:
            raise RoleLost(f"{self.name} died in its start: {reason_of(error)}") from error
        except RayTaskError as error:
            kill(actor)
            raise error.cause from None
        except TimeoutError:
            kill(actor)
            limit_s = self._config.start_timeout_s
            raise RoleLost(f"{self.name} did not start within {limit_s:g} s") from None
        except BaseException:
            kill(actor)
            raise
        self._actor = actor


def wait_for(answer: Any) -> asyncio.Future[Any]:
    """What a call answers. Who gives it up does not cancel it: Ray's client could not bear that."""
    future = asyncio.wrap_future(answer.future())
    future.add_done_callback(lambda each: each.cancelled() or each.exception())  # nobody may ask
    return asyncio.shield(future)


def kill(actor: Any) -> None:
    """End an actor's process, also one that is frozen: its node sees to it."""
    with contextlib.suppress(RayError, ValueError):
        ray.kill(actor, no_restart=True)


def reason_of(error: BaseException) -> str:
    """What happened, from what Ray says of it, which is long."""
    if found := re.search(r"Worker exit type: (\w+)", str(error)):
        return f"its process ended ({found[1]})"
    _, is_podman, said = str(error).rpartition("stderr=")
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    if is_podman and lines:
        return " | ".join(lines[-3:])
    return lines[-1][:200] if lines else type(error).__name__
