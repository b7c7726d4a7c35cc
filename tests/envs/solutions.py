"""Plays solutions in `PythonCode-v0`, for the tests of functions and of programs."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import gymnasium


@contextmanager
def python_code() -> Iterator[gymnasium.Env[str, str]]:
    """Make the environment, with short limits and without an instruction."""
    sandbox = {"preload": [], "limits": {"wall_s": 3.0}}
    env = gymnasium.make("tir_alp.envs:PythonCode-v0", instruction="", sandbox=sandbox)
    try:
        yield env
    finally:
        env.close()


def play(env: gymnasium.Env[str, str], code: str, task: Mapping[str, Any]) -> tuple[float, str]:
    """Submit a solution of a task; returns the reward, and why it is not 1."""
    env.reset(options={"task": dict(task)})
    _, reward, terminated, truncated, info = env.step(f"```solution\n{code}\n```")
    assert (terminated, truncated) == (True, False)
    return float(reward), info["error"]
