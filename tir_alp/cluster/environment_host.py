"""What lives in an environment runner's actor: environments, each by a number of its episode."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import Any

import gymnasium
import ray

from tir_alp.cluster.same_code import Host
from tir_alp.config import Config
from tir_alp.rollouts.environment import make_environment


class EnvironmentHost(Host):
    """Environments. Calls block, and run in as many threads as the actor has."""

    def __init__(self) -> None:
        self._environments: dict[int, gymnasium.Env[str, str]] = {}
        self._lock = threading.Lock()

    def start(self) -> None:
        """Nothing to prepare: the actor is there."""

    def reset(self, key: int, config: Config, seed: int | None, options: dict[str, Any]) -> str:
        """Make an environment if there is none of that number, and reset it."""
        with self._lock:
            env = self._environments.get(key)
        if env is None:
            env = make_environment(config)
            with self._lock:
                self._environments[key] = env
        return env.reset(seed=seed, options=options)[0]

    def step(self, key: int, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """As `Env.step`, with numbers that are Python's own."""
        text, reward, terminated, truncated, info = self._environments[key].step(action)
        return text, float(reward), bool(terminated), bool(truncated), info

    def ask(self, key: int, method: str) -> Any:
        """What a method of the environment says; None if it has none of that name."""
        env = self._environments[key]
        return env.get_wrapper_attr(method)() if env.has_wrapper_attr(method) else None

    def close(self, key: int) -> None:
        """Forget an environment; one that is unknown is none."""
        with self._lock:
            env = self._environments.pop(key, None)
        if env is not None:
            env.close()

    @ray.method(concurrency_group="health")
    def heartbeat(self) -> Mapping[str, float]:
        """How many environments there are, in which process. It has a thread of its own."""
        return {"environments": len(self._environments), "pid": os.getpid()}
