"""Environments in other processes, as `gymnasium.Env`s that block threads of this process.

An environment stays in the process in which it was made. If its host is lost, the episode fails by
a failure of infrastructure, and is played once more in an environment of another host. An episode
that has not begun moves to another host at once.
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


class EnvironmentPool:
    """Hands out environments, each on the host that has the fewest.

    Args:
        hosts: The slots of the hosts.
        config: Returns the current config of the run, whose sandbox hosts may have changed.
        suspects: Finds tasks that kill their hosts.
        timeout_s: Deadline of a call.
        has_sandboxes: Whether the cluster has sandbox hosts, and replaces those that are lost.
    """

    def __init__(
        self,
        hosts: Sequence[WatchedActor],
        config: Callable[[], Config],
        suspects: Suspects,
        timeout_s: float,
        has_sandboxes: bool,
    ) -> None:
        self.hosts, self.suspects, self.timeout_s = hosts, suspects, timeout_s
        self.has_sandboxes = has_sandboxes
        self.config = config
        self._keys = itertools.count()
        self._num_here: Counter[WatchedActor] = Counter()
        self._lock = threading.Lock()

    def make(self) -> RemoteEnvironment:
        """Make an environment, which gets its host when it is first reset."""
        return RemoteEnvironment(self, next(self._keys))

    def occupy(self) -> tuple[WatchedActor, int, Any]:
        """Choose a host, and count one more environment on it.

        Returns:
            The host's slot, the slot's generation, and the actor.

        Raises:
            RoleLost: If there is no host within the deadline.
        """
        deadline = time.monotonic() + self.timeout_s
        while time.monotonic() < deadline:
            with self._lock:
                all_ = [(host, host.generation, host.actor) for host in self.hosts]
                if there := [each for each in all_ if each[-1] is not None]:
                    chosen = min(there, key=lambda each: self._num_here[each[0]])
                    self._num_here[chosen[0]] += 1
                    return chosen
            time.sleep(_PAUSE_S)
        raise RoleLost(f"there was no environment runner for {self.timeout_s:g} s")

    def leave(self, host: WatchedActor) -> None:
        """Count one environment less on a host."""
        with self._lock:
            self._num_here[host] -= 1


class RemoteEnvironment(gymnasium.Env[str, str]):
    """One environment, in another process. Used by one thread at a time."""

    def __init__(self, pool: EnvironmentPool, key: int) -> None:
        self._pool, self._key = pool, key
        self._host: tuple[WatchedActor, int, Any] | None = None
        self._task_id = ""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Begin an episode of `options["task"]`, on a host that is chosen now if there is none yet.

        Raises:
            RoleLost: If its host was lost.
            PoisonTask: If the task is excluded.
            SandboxRefused: If there is no sandbox, or all sandbox hosts are lost for too long.
        """
        assert options is not None, "the caller has to choose the task"
        self._task_id = str(options["task"]["task_id"])
        deadline = time.monotonic() + self._pool.timeout_s
        while True:
            if self._host is None:
                self._host = self._pool.occupy()
            try:
                return self._call("reset", self._pool.config(), seed, options), {}
            except HostGone:
                self.close()
            except SandboxRefused:
                if not self._pool.has_sandboxes or time.monotonic() > deadline:
                    raise
                time.sleep(_SANDBOX_PAUSE_S)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """As `Env.step`. Raises RoleLost or HostGone if its host was lost."""
        return self._call("step", action)

    def run_report(self) -> dict[str, Any]:
        """As the environment's own."""
        return dict(self._call("ask", "run_report") or {})

    def harmless_actions(self) -> tuple[str, ...]:
        """As the environment's own; empty if it has none."""
        return tuple(self._call("ask", "harmless_actions") or ())

    def close(self) -> None:
        """Free the environment. Closing twice is allowed."""
        if self._host is not None:
            (host, _, actor), self._host = self._host, None
            self._pool.leave(host)
            actor.close.remote(self._key)

    def _call(self, method: str, *arguments: Any) -> Any:
        assert self._host is not None
        host, generation, actor = self._host
        note_host(host.name)
        with self._pool.suspects.at_work(self._task_id, host.name, generation) as report_death:
            if host.actor is not actor:
                raise HostGone(f"{host.name} was lost")
            answer = getattr(actor, method).remote(self._key, *arguments)
            try:
                return ray.get(answer, timeout=self._pool.timeout_s)
            except RayActorError as error:
                report_death(reason_of(error))
                raise host.report_suspicion(actor, reason_of(error)) from error
            except GetTimeoutError as error:
                raise TimeoutError(f"{host.name} did not answer") from error
            except RayTaskError as error:
                raise error.cause from None  # what the environment raised
