"""Adapts SkyRL-Gym, the package `skyrl-gym`: `skyrl_gym.make(NAME, env_config=..., extras=...)`.

Its environments have no tasks of their own. The question and answer of a task become the prompt and
the ground truth; its other keys are passed as extras, and so is `settings.extras`. A reset without
a task uses `settings.task`.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from importlib.metadata import version as package_version
from typing import Any

import skyrl_gym
from omegaconf import OmegaConf
from skyrl_gym.envs.registration import registry
from texts import as_text


def version() -> str:
    """Return the installed version."""
    return package_version("skyrl-gym")


class Environment:
    """One environment of SkyRL-Gym, which is made anew for every task."""

    def __init__(self, name: str, settings: dict[str, Any]) -> None:
        if unknown := settings.keys() - {"env_config", "extras", "task"}:
            raise ValueError(f"settings of SkyRL-Gym are env_config, extras, task, not {unknown}")
        if ":" not in name and name not in registry:
            raise ValueError(
                f"there is no environment of that name; there are: {', '.join(sorted(registry))}"
            )
        self._name = name
        self._config = OmegaConf.create(settings.get("env_config", {}))
        self._extras = settings.get("extras", {})
        self._task = settings.get("task", {})
        self._env: Any = None

    def reset(self, seed: int, task: dict[str, Any]) -> str:
        """Begin an episode of a task with `question` and `answer`, or of the settings' task."""
        task = task or self._task
        if not {"question", "answer"} <= task.keys():
            raise ValueError("SkyRL-Gym has no tasks of its own: pass one with question and answer")
        self.close()
        extras = {
            "reward_spec": {"method": "rule", "ground_truth": task["answer"]},
            "extra_info": {},
            **task,
            **self._extras,
        }
        self._env = skyrl_gym.make(self._name, env_config=self._config, extras=extras)
        messages, _ = self._env.init([{"role": "user", "content": task["question"]}])
        return as_text(messages)

    def step(self, action: str) -> dict[str, Any]:
        """Play one turn."""
        output = self._env.step(action)
        return {
            "observation": as_text(output["observations"]),
            "reward": float(output["reward"]),
            "terminated": bool(output["done"]),
            "truncated": False,
            "info": output.get("metadata") or {},
        }

    def close(self) -> None:
        """Free what the environment holds."""
        if self._env is not None:
            self._env.close()
            self._env = None
