"""Any `gymnasium` environment of texts: `gymnasium.make(NAME, **settings)`. Ours are such.

With this, the OpenEnv server reaches our environments from an interpreter that has only OpenEnv.
"""

from __future__ import annotations

from importlib.metadata import version as package_version
from typing import Any

import gymnasium


def version() -> str:
    """Which one is installed."""
    return package_version("gymnasium")


class Environment:
    """One environment of Gymnasium's."""

    def __init__(self, name: str, settings: dict[str, Any]) -> None:
        self._env = gymnasium.make(name, disable_env_checker=True, **settings)

    def reset(self, seed: int | None, task: dict[str, Any] | None) -> str:
        """Begin an episode of the task that is given, or of one drawn by the seed."""
        text, _ = self._env.reset(seed=seed, options={"task": task} if task else None)
        return text

    def step(self, action: str) -> dict[str, Any]:
        """One turn."""
        text, reward, terminated, truncated, info = self._env.step(action)
        return {
            "observation": text,
            "reward": float(reward),
            "terminated": bool(terminated),
            "truncated": bool(truncated),
            "info": info,
        }

    def close(self) -> None:
        """Free what the environment holds."""
        self._env.close()
