"""What runs in an environment runner's actor: environments, each with a key of its own."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import Any

import gymnasium
import ray

from tir_alp.cluster.same_code import ReportsCode
from tir_alp.config import Config
from tir_alp.rollouts.environment import make_environment


class EnvironmentHost(ReportsCode):
    """Environments. Calls block; each runs in one of the actor's threads."""

    def __init__(self) -> None:
        self._environments: dict[int, gymnasium.Env[str, str]] = {}
        self._lock = threading.Lock()

    def start(self) -> None:
        """Do nothing: a call that returns shows that the actor has started."""

    def reset(self, key: int, config: Config, seed: int | None, options: dict[str, Any]) -> str:
        """Reset the environment of a key; it is made if there is none."""
        with self._lock:
            env = self._environments.get(key)
        if env is None:
            env = make_environment(config)
            with self._lock:
                self._environments[key] = env
        return env.reset(seed=seed, options=options)[0]

    def step(self, key: int, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """As `Env.step`, with Python's own numbers."""
        text, reward, terminated, truncated, info = self._environments[key].step(action)
        return text, float(reward), bool(terminated), bool(truncated), info

    def ask(self, key: int, method: str) -> Any:
        """Call a method of the environment; returns None if it has no such method."""
        env = self._environments[key]
        return env.get_wrapper_attr(method)() if env.has_wrapper_attr(method) else None

    def close(self, key: int) -> None:
        """Close the environment of a key, if there is one."""
        with self._lock:
            env = self._environments.pop(key, None)
        if env is not None:
            env.close()

    @ray.method(concurrency_group="health")
    def heartbeat(self) -> Mapping[str, float]:
        """Health report: the number of environments, and the process id. It has its own thread."""
        return {"environments": len(self._environments), "pid": os.getpid()}
