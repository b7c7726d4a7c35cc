"""One slot of a run in the cluster, and the actor in it: watched, and replaced when it dies.

An actor counts as lost when its process is gone, or when it does not answer a health check in time.
It is then killed, whatever it is doing, and calls that wait for it fail with `RoleLost`. Another
actor is started in its slot, again and again, because a node may come back. All of this runs in the
event loop of the run; only `report_suspicion` may be called from other threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from tir_alp.config import ClusterConfig
from tir_alp.engines.base import Log
from tir_alp.roles import RoleLost

MakeActor = Callable[[], Any]
"""Makes an actor; its process need not have started when the call returns."""

_MAX_PAUSE_S = 60.0  # between two starts that failed


class WatchedActor:
    """A slot for an actor.

    Args:
        name: Name for messages, such as "engine-1".
        make: Makes the actor.
        start: Makes the actor ready for work, e.g. loads a model.
        config: Deadlines.
        log: Receives losses and replacements.
        is_replaced: Whether another actor takes the slot of one that is lost.
    """

    def __init__(
        self,
        name: str,
        make: MakeActor,
        start: Callable[[Any], Awaitable[None]],
        config: ClusterConfig,
        log: Log,
        is_replaced: bool = True,
    ) -> None:
        self.name, self.num_replaced = name, 0
        self.generation = 0
        """Number of actors lost in this slot; incremented when the loss is noticed."""
        self.health: Mapping[str, Any] = {}
        """The actor's last health report, `pid` included; empty before the first."""
        self._make, self._start, self._config, self._log = make, start, config, log
        self._is_replaced = is_replaced
        self._actor: Any = None
        self._suspected: Any = None
        self._loop = asyncio.get_running_loop()
        self._suspicions: asyncio.Queue[tuple[Any, str]] = asyncio.Queue()
        self._watcher: asyncio.Task[None] | None = None

    @property
    def actor(self) -> Any:
        """The actor; None from the first suspicion on, until another one works."""
        return None if self._actor is self._suspected else self._actor

    async def open(self) -> None:
        """Start the first actor. Raises what its start raises, and RoleLost if it dies there."""
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
        """Call a method of the actor. Cancelling the wait cancels the call in the actor, too.

        Raises:
            RoleLost: If there is no actor, or it died.
            TimeoutError: If it did not answer in time.
        """
        actor = self.actor
        if actor is None:
            raise RoleLost(f"{self.name} is being replaced")
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

    def take_report(self, report: Mapping[str, Any]) -> None:
        """Keep a health report, and pass the lines of its `log` on to the run's log."""
        self.health = {name: value for name, value in report.items() if name != "log"}
        for line in report.get("log", ()):
            self._log(f"{self.name}: {line}")

    def report_suspicion(self, actor: Any, reason: str) -> RoleLost:
        """Have an actor replaced, unless it already was. May be called from any thread.

        Returns:
            What the caller should raise.
        """
        if actor is self._actor:
            self._suspected = actor
        with contextlib.suppress(RuntimeError):  # the run has ended
            self._loop.call_soon_threadsafe(self._suspicions.put_nowait, (actor, reason))
        return RoleLost(f"{self.name} was lost: {reason}")

    # -------------------------------------------------------------------------- watching

    async def _watch(self) -> None:
        """Consumes suspicions and health reports; ends when a lost actor is not replaced."""
        while self._actor is not None:
            reason = await self._next_suspicion() or await self._check_health()
            if reason:
                await self._replace(reason)

    async def _next_suspicion(self) -> str:
        """Wait for a suspicion about the actor, until the next health check is due."""
        try:
            async with asyncio.timeout(self._config.heartbeat_s):
                while True:
                    actor, reason = await self._suspicions.get()
                    if actor is self._actor:
                        return reason
        except TimeoutError:
            return ""

    async def _check_health(self) -> str:
        """Ask the actor for a health report; returns why it has to be replaced, or ""."""
        patience_s = self._config.patience_s
        try:
            async with asyncio.timeout(patience_s):
                self.take_report(await wait_for(self._actor.heartbeat.remote()))
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
            except Exception as error:  # whatever it is: it is logged, and may pass
                self._log(f"{self.name} could not be started: {error}; again in {pause_s:g} s")
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _MAX_PAUSE_S)
        self.num_replaced += 1
        self._log(f"{self.name} is back")

    async def _begin(self) -> None:
        """Make an actor and start it. An actor whose start fails is killed."""
        actor = self._make()
        try:
            async with asyncio.timeout(self._config.start_timeout_s):
                await self._start(actor)
        except RayActorError as error:
            raise RoleLost(f"{self.name} died while it started: {reason_of(error)}") from error
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
    """The result of a Ray call, to be awaited.

    Cancelling the wait does not cancel the call, because Ray's client cannot handle that.
    """
    future = asyncio.wrap_future(answer.future())
    future.add_done_callback(lambda each: each.cancelled() or each.exception())  # nobody may ask
    return asyncio.shield(future)


def kill(actor: Any) -> None:
    """End an actor's process, even a frozen one: Ray's process on its node kills it."""
    with contextlib.suppress(RayError, ValueError):
        ray.kill(actor, no_restart=True)


def reason_of(error: BaseException) -> str:
    """The essence of an error of Ray, whose own text is long."""
    if found := re.search(r"Worker exit type: (\w+)", str(error)):
        return f"its process ended ({found[1]})"
    _, is_podman, text = str(error).rpartition("stderr=")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if is_podman and lines:
        return " | ".join(lines[-3:])
    return lines[-1][:200] if lines else type(error).__name__
