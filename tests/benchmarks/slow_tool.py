"""An environment with a slow tool: `tests.benchmarks.slow_tool:SlowTool-v0`.

The duration of a call has a lognormal distribution and depends only on task and turn, so every mode
of rollouts has the same delays. An episode has one to five turns, three on average, which depends
only on the task.
"""

from __future__ import annotations

import math
import random
import time
from typing import Any

import gymnasium

from tir_alp.envs.spaces import TextSpace


class SlowTool(gymnasium.Env[str, str]):
    """Answers anything that the model writes.

    Args:
        median_s: Median duration of a call, in seconds.
        sigma: Standard deviation of the logarithm of the duration.
        max_s: Maximum duration of a call, in seconds.
    """

    def __init__(self, *, median_s: float, sigma: float, max_s: float) -> None:
        self.observation_space = self.action_space = TextSpace()
        self._median_s, self._sigma, self._max_s = median_s, sigma, max_s

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        assert options is not None
        self._rng = random.Random(options["task"]["task_id"])
        self._num_turns = self._rng.randint(1, 5)
        self._reward = float(self._rng.random() < 0.5)
        return options["task"]["question"], {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self._num_turns -= 1
        if self._num_turns <= 0:
            return "", float(len(action) % 2), True, False, {}
        seconds = self._median_s * math.exp(self._rng.gauss(0.0, self._sigma))
        time.sleep(min(seconds, self._max_s))
        return "42", 0.0, False, False, {"tool_calls": 1}


gymnasium.register(id="SlowTool-v0", entry_point=f"{__name__}:SlowTool")
