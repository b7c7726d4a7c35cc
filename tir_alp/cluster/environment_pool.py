"""Environments in other processes, as `gymnasium.Env`s that threads of this one block in.

An environment stays where it was made. If its host is lost, the episode fails as one that
infrastructure broke, and is played once more, in an environment of another host. One that has not
begun goes to another host at once.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from tir_alp.cluster.poison_tasks import HostGone, Suspects
from tir_alp.cluster.watched_actor import WatchedActor, reason_of
from tir_alp.config import Config
from tir_alp.roles import RoleLost
from tir_alp.run.watchdog import note_host
from tir_alp.tools.sandbox import SandboxRefused

_PAUSE_S = 0.1
_SANDBOX_PAUSE_S = 1.0  # every episode that begins asks, and a host takes seconds to be replaced


class Environments:
    """Gives out environments, each on the host with the fewest.

    Args:
        parts: The places of the hosts.
        config: Of the run, as of now: it may name other sandbox hosts than before.
        suspects: Sees to tasks that kill their hosts.
        timeout_s: Deadline of a call.
        has_sandboxes: Whether the cluster has sandbox hosts, and replaces those that are lost.
    """

    def __init__(
        self,
        parts: Sequence[WatchedActor],
        config: Callable[[], Config],
        suspects: Suspects,
        timeout_s: float,
        has_sandboxes: bool,
    ) -> None:
        self.parts, self.suspects, self.timeout_s = parts, suspects, timeout_s
        self.has_sandboxes = has_sandboxes
        self.config = config
        self._keys = itertools.count()
        self._num_here: Counter[WatchedActor] = Counter()
        self._lock = threading.Lock()

    def make(self) -> RemoteEnvironment:
        """An environment, which gets its host when it is reset."""
        return RemoteEnvironment(self, next(self._keys))

    def occupy(self) -> tuple[WatchedActor, int, Any]:
        """Choose a host, and count one environment more on it: its place, generation and actor.

        Raises:
            RoleLost: There is none within the deadline.
        """
        deadline = time.monotonic() + self.timeout_s
        while time.monotonic() < deadline:
            with self._lock:
                all_ = [(part, part.generation, part.actor) for part in self.parts]
                if there := [each for each in all_ if each[-1] is not None]:
                    chosen = min(there, key=lambda each: self._num_here[each[0]])
                    self._num_here[chosen[0]] += 1
                    return chosen
            time.sleep(_PAUSE_S)
        raise RoleLost(f"there was no environment runner for {self.timeout_s:g} s")

    def leave(self, part: WatchedActor) -> None:
        """Count one environment less on a host."""
        with self._lock:
            self._num_here[part] -= 1


class RemoteEnvironment(gymnasium.Env[str, str]):
    """One environment, in another process. Used by one thread at a time."""

    def __init__(self, environments: Environments, key: int) -> None:
        self._all, self._key = environments, key
        self._place: tuple[WatchedActor, int, Any] | None = None
        self._task_id = ""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Begin an episode of `options["task"]`, where the environment is or gets to be.

        Raises:
            RoleLost: Its host was lost.
            PoisonTask: The task is dropped.
            SandboxRefused: There is no sandbox, or all of their hosts are lost for too long.
        """
        assert options is not None, "tasks are given, and not drawn"
        self._task_id = str(options["task"]["task_id"])
        deadline = time.monotonic() + self._all.timeout_s
        while True:
            if self._place is None:
                self._place = self._all.occupy()
            try:
                return self._call("reset", self._all.config(), seed, options), {}
            except HostGone:
                self.close()
            except SandboxRefused:
                if not self._all.has_sandboxes or time.monotonic() > deadline:
                    raise
                time.sleep(_SANDBOX_PAUSE_S)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """As `Env.step`. Raises RoleLost or HostGone if its host was lost."""
        return self._call("step", action)

    def run_report(self) -> dict[str, Any]:
        """As the environment's own."""
        return dict(self._call("ask", "run_report") or {})

    def harmless_actions(self) -> tuple[str, ...]:
        """As the environment's own; empty if it does not say."""
        return tuple(self._call("ask", "harmless_actions") or ())

    def close(self) -> None:
        """Free it. Closing twice is allowed."""
        if self._place is not None:
            (part, _, actor), self._place = self._place, None
            self._all.leave(part)
            actor.close.remote(self._key)

    def _call(self, method: str, *arguments: Any) -> Any:
        assert self._place is not None
        part, generation, actor = self._place
        note_host(part.name)
        with self._all.suspects.at_work(self._task_id, part.name, generation) as report_death:
            if part.actor is not actor:
                raise HostGone(f"{part.name} was lost")
            answer = getattr(actor, method).remote(self._key, *arguments)
            try:
                return ray.get(answer, timeout=self._all.timeout_s)
            except RayActorError as error:
                report_death(reason_of(error))
                raise part.report_suspicion(actor, reason_of(error)) from error
            except GetTimeoutError as error:
                raise TimeoutError(f"{part.name} did not answer") from error
            except RayTaskError as error:
                raise error.cause from None  # what the environment raised
