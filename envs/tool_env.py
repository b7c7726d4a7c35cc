r"""The base of our environments: an environment is a source of tasks, a prompt, tools and a grader.

Text in, text out. One `step` is one turn of the model, and what ends it is one of three:

* it calls a tool: the observation is the tool's text, and the episode goes on;
* it answers in `\boxed{...}`: the answer is graded, and the episode terminates;
* neither: the turn is void, and the episode terminates with reward 0.

A call wins over an answer in the same text (`parsing.parse_action` says why). Answers terminate;
limits truncate, never both. Every `info` of a step holds exactly the fields of `StepInfo`. When its
`outcome` is one of infrastructure (`Outcome.is_infrastructure`: the sandbox or the grader failed),
the episode is truncated and its reward of 0 means nothing: retry the task, or drop it.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import gymnasium
from gymnasium.error import ResetNeeded

from tir_alp.envs.grading import Grade
from tir_alp.envs.parsing import Answer, parse_action
from tir_alp.envs.spaces import TextSpace
from tir_alp.envs.tasks import TaskSource
from tir_alp.tools.base import ReportingTool, Tool, ToolResult, ToolSession
from tir_alp.tools.calls import ToolCall
from tir_alp.tools.outcome import Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInfo:
    """What `step` reports beside the reward, as a dict with these keys.

    Example, a wrong answer: `StepInfo(answer="7", correct=False)`.
    """

    outcome: str = Outcome.OK.value
    """Value of the `Outcome` of the tool call or of the grading; "ok" where there was neither."""
    tool_calls: int = 0
    """Tool calls of this step."""
    void: bool = False
    """Whether the turn held neither a call nor an answer."""
    answer: str | None = None
    """The answer, as the model wrote it."""
    correct: bool | None = None
    """Whether it is right; None where nothing was graded."""
    error: str = ""
    """For people: what failed."""
    tool_s: float = 0.0
    """Seconds the tool took, queueing included."""


class ToolEnv(gymnasium.Env[str, str], ABC):
    """A Gymnasium environment of tasks that a model answers, with tools at hand.

    A subclass says what the model reads (`prompt`) and whether an answer is right (`grade`).
    An environment is used by one thread at a time, but not always by the same one.

    Args:
        tools: what the model can call. A Python block calls the one named `python`.
        tasks: where `reset` draws a task from when it is not given one.
        max_turns: turns after which an episode without an answer is truncated.
    """

    def __init__(self, *, tools: Sequence[Tool], tasks: TaskSource, max_turns: int):
        if max_turns < 1:
            raise ValueError(f"max_turns is {max_turns}: an episode needs at least one turn")
        if not len(tasks):
            raise ValueError("there is not one task to draw from")
        self.observation_space = TextSpace()
        self.action_space = TextSpace()
        self._tools = {tool.name: tool for tool in tools}
        self._tasks = tasks
        self._max_turns = max_turns
        self._sessions: dict[str, ToolSession] = {}
        self._task: dict[str, Any] | None = None  # None: no episode is under way
        self._num_turns = 0

    @abstractmethod
    def prompt(self, task: Mapping[str, Any]) -> str:
        """Return what the model is asked."""

    @abstractmethod
    def grade(self, task: Mapping[str, Any], answer: str) -> Grade:
        """Compare an answer with the task's truth. Blocking, within a deadline of its own."""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Begin an episode.

        Args:
            seed: seeds the draw of tasks.
            options: `{"task": {...}}` to set the task; without it one is drawn.

        Returns:
            The prompt, and `{"task": {...}}` with the whole task, its answer included.
        """
        super().reset(seed=seed)
        self._end_episode()
        task = (options or {}).get("task")
        if task is None:
            task = self._tasks[int(self.np_random.integers(len(self._tasks)))]
        prompt = self.prompt(task)
        self._task = dict(task)
        self._num_turns = 0
        return prompt, {"task": copy.deepcopy(self._task)}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Take one turn of the model; see the module's docstring for what it may hold."""
        if self._task is None:
            raise ResetNeeded("no episode is under way: call reset() before step()")
        self._num_turns += 1
        observation, reward, terminated, truncated = "", 0.0, False, False
        match parse_action(action):
            case ToolCall() as call:
                result = self._run_tool(call)
                observation = result.text
                truncated = result.outcome.is_infrastructure or self._num_turns >= self._max_turns
                info = StepInfo(
                    outcome=result.outcome.value,
                    tool_calls=1,
                    error=result.error,
                    tool_s=result.duration_s,
                )
            case Answer(text=answer):
                grade = self.grade(self._task, answer)
                reward = 1.0 if grade.correct else 0.0
                truncated = grade.outcome.is_infrastructure
                terminated = not truncated
                info = StepInfo(
                    outcome=grade.outcome.value,
                    answer=answer,
                    correct=grade.correct,
                    error=grade.error,
                )
            case None:
                terminated = True
                info = StepInfo(void=True)
        if terminated or truncated:
            self._end_episode()
        return observation, reward, terminated, truncated, asdict(info)

    def run_report(self) -> dict[str, Any]:
        """Say what the tools' calls run in, for a trainer that asks.

        Returns:
            `{"tools": {name: {...}}, "warnings": [sentence, ...]}`, of the tools that report.
        """
        tools = self._tools.items()
        reports = {name: tool.report() for name, tool in tools if isinstance(tool, ReportingTool)}
        return {
            "tools": {name: dict(report.runs_in) for name, report in reports.items()},
            "warnings": [warning for report in reports.values() for warning in report.warnings],
        }

    def close(self) -> None:
        """Free the sessions of the tools. Closing twice is allowed."""
        self._end_episode()

    def _run_tool(self, call: ToolCall) -> ToolResult:
        tool = self._tools.get(call.name)
        if tool is None:
            error = f"there is no tool named {call.name!r}; there are: {sorted(self._tools)}"
            return ToolResult(
                outcome=Outcome.TOOL_ERROR, text=f"Error: {error}", duration_s=0.0, error=error
            )
        if call.name not in self._sessions:
            self._sessions[call.name] = tool.open_session()
        return tool.run(call.arguments, self._sessions[call.name])

    def _end_episode(self) -> None:
        self._task = None
        while self._sessions:
            _, session = self._sessions.popitem()
            session.close()
