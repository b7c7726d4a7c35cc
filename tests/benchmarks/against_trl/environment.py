"""An environment with a fixed course: so many turns, and a tool call or a fixed text after each.

What the model writes does not matter, so that a random model makes the same calls as a good one.
Every second sequence is rewarded.
"""

from __future__ import annotations

import itertools
from typing import Any, ClassVar

import gymnasium

from tests.benchmarks.against_trl.worker import PROGRAM, SHOWN
from tir_alp.envs.spaces import TextSpace
from tir_alp.tools.outcome import Outcome
from tir_alp.tools.python_tool import PythonTool

_NUMBERS = itertools.count()


class FixedTurns(gymnasium.Env[str, str]):
    """Shows the question, and ends after `num_completions` turns.

    Args:
        num_completions: Number of turns.
        has_tool: Whether the Python tool runs between two turns, in the sandbox.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}
    call_format = "none"

    def __init__(self, num_completions: int, has_tool: bool) -> None:
        self.observation_space = TextSpace()
        self.action_space = TextSpace()
        self._num_completions, self._turn = num_completions, 0
        sandbox = {"preload": []}  # the program imports nothing
        self._tool = PythonTool(sandbox) if has_tool else None
        self._session = None if self._tool is None else self._tool.open_session()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Begin with the task of the options."""
        super().reset(seed=seed)
        assert options is not None, "the run gives the task"
        self._turn = 0
        return options["task"]["question"], {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Call the tool, or end."""
        self._turn += 1
        if self._turn == self._num_completions:
            return "", float(next(_NUMBERS) % 2), True, False, {}
        if self._tool is None:
            return SHOWN, 0.0, False, False, {}
        assert self._session is not None
        result = self._tool.run({"code": PROGRAM}, self._session)
        info = {"outcome": result.outcome.value, "tool_calls": 1}
        if result.outcome is Outcome.OK and result.text.strip() != SHOWN:
            raise ValueError(f"the tool printed {result.text!r} and not {SHOWN}")
        return result.text.strip(), 0.0, False, False, info

    def close(self) -> None:
        """End the interpreter of the episode."""
        if self._session is not None:
            self._session.close()


gymnasium.register(id="FixedTurns-v0", entry_point=f"{__name__}:FixedTurns")
