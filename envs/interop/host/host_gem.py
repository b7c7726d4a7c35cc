"""Adapts GEM, the package `gem-llm`: `gem.make(NAME, **settings)`."""

# pyright: reportMissingImports=false

from __future__ import annotations

from importlib.metadata import version as package_version
from typing import Any

import gem

MAX_THREADS = 1
"""GEM draws from Python's global generator: concurrent games would change each other's draws."""


def version() -> str:
    """Return the installed version."""
    return package_version("gem-llm")


class Environment:
    """One environment of GEM."""

    def __init__(self, name: str, settings: dict[str, Any]) -> None:
        self._env = gem.make(name, **settings)

    def reset(self, seed: int, task: dict[str, Any]) -> str:
        """Begin an episode; GEM draws the task itself, by the seed."""
        text, info = self._env.reset(seed=seed)
        return _with_suffix(text, info)

    def step(self, action: str) -> dict[str, Any]:
        """Play one turn. The suffix that GEM shows below an observation is part of it."""
        text, reward, terminated, truncated, info = self._env.step(action)
        return {
            "observation": _with_suffix(text, info),
            "reward": float(reward),
            "terminated": bool(terminated),
            "truncated": bool(truncated),
            "info": info,
        }

    def close(self) -> None:
        """GEM's environments hold nothing."""


def _with_suffix(text: str, info: dict[str, Any]) -> str:
    suffix = info.get("suffix", "")
    return f"{text}\n{suffix}" if suffix else text
