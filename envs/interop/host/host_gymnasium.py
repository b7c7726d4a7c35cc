"""Adapts any `gymnasium` environment of texts: `gymnasium.make(NAME, **settings)`.

The environments of tir_alp are such. The OpenEnv server reaches them through this module, from an
interpreter that has only OpenEnv.
"""

from __future__ import annotations

from importlib.metadata import version as package_version
from typing import Any

import gymnasium


def version() -> str:
    """Return the installed version."""
    return package_version("gymnasium")


class Environment:
    """One environment of Gymnasium."""

    def __init__(self, name: str, settings: dict[str, Any]) -> None:
        self._env = gymnasium.make(name, disable_env_checker=True, **settings)

    def reset(self, seed: int | None, task: dict[str, Any] | None) -> str:
        """Begin an episode of the given task, or of one drawn by the seed."""
        text, _ = self._env.reset(seed=seed, options={"task": task} if task else None)
        return text

    def step(self, action: str) -> dict[str, Any]:
        """Play one turn."""
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
