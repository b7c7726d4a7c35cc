r"""The base class of environments: a source of tasks, a prompt, tools and a grading rule.

Text in, text out. One `step` is one turn of the model, and a turn does one of three things:

* It makes tool calls: the observation is the tools' texts, and the episode continues.
* It answers, in `\boxed{...}` unless an environment defines another form: the answer is graded, and
  the episode terminates.
* It does neither: the turn is void, and the episode terminates without an answer.

A call takes precedence over an answer in the same text (see `parsing.parse_action`). Answers
terminate an episode and limits truncate it, never both. The `info` of a step has exactly the fields
of `StepInfo`. If its `outcome` is an infrastructure failure (`Outcome.is_infrastructure`: the
sandbox or the grader failed), the episode is truncated and its reward of 0 is meaningless: retry
the task, or drop it.
"""

from __future__ import annotations

import copy
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypedDict

import gymnasium
from gymnasium.error import ResetNeeded

from tir_alp.envs.grading import Grade
from tir_alp.envs.parsing import Answer, boxed_answer, parse_action
from tir_alp.envs.reward_functions import grade_by, read_rewards
from tir_alp.envs.reward_shaping import EpisodeFacts, RewardShaping, reward_terms
from tir_alp.envs.spaces import TextSpace
from tir_alp.envs.tasks import TaskSource
from tir_alp.envs.tool_calls import ToolCalls, recorded_results, summary
from tir_alp.envs.transcript import METADATA, Transcript
from tir_alp.tools.base import (
    ReportingTool,
    Tool,
    ToolResult,
    TriedTool,
    function_schema,
)
from tir_alp.tools.calls import (
    CALL_FORMATS,
    BadCall,
    CallFormat,
    ToolCall,
    find_calls,
    write_call,
)
from tir_alp.tools.held_out import is_held_out
from tir_alp.tools.outcome import Outcome

CODE_EXECUTION_RESULT = "\nCode execution result: {output}\n"
"""SimpleTIR's wording of observations, as a value of `observation`."""

_MAX_DRAWS = 256  # until a task is in the split asked for, which may have one question in eight
_TOOLS_TEXT = """\
You may call these tools:
{schemas}
To call one, write
<tool_call>{{"name": "NAME", "arguments": {{...}}}}</tool_call>
and stop; you are shown the result."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInfo:
    """The info of a step, which `step` returns as a dict with these keys.

    Example, a wrong answer: `StepInfo(answer="7", correct=False)`.
    """

    outcome: str = Outcome.OK.value
    """Value of the `Outcome` of the tool calls or the grading; "ok" if there was neither."""
    tool_calls: int = 0
    """Number of tool calls in this step."""
    bad_calls: int = 0
    """Number of them that could not be read, so that no tool was asked."""
    void: bool = False
    """Whether the turn contained neither a call nor an answer."""
    answer: str | None = None
    """The answer, as the model wrote it."""
    correct: bool | None = None
    """Whether the answer is right; None if nothing was graded."""
    error: str = ""
    """Description of a failure, for people."""
    tool_s: float = 0.0
    """Duration of the tool calls in seconds, added up, queueing included."""
    calls: list[dict[str, Any]] = field(default_factory=list)
    """If there are several calls, for each the fields of its `ToolResult`: `outcome`, `text`, which
    is what the model reads, `duration_s` and `error`."""
    rewards: dict[str, float] = field(default_factory=dict)
    """The terms whose sum is the reward of an episode's last step; empty in earlier steps, and if
    infrastructure failed."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name; `dataclasses.asdict` would take a quarter of an episode."""
        return {name: getattr(self, name) for name in self.__slots__}


class EnvSettings(TypedDict, total=False):
    """The settings of every `ToolEnv`; its docstring describes them."""

    instruction: str | None
    max_turns: int
    call_format: CallFormat
    max_calls: int
    parallel_calls: bool
    tools_in_prompt: bool
    observation: str
    shaping: Mapping[str, float] | None
    rewards: Sequence[str | Mapping[str, Any]]
    render_mode: str | None


class ToolEnv(gymnasium.Env[str, str], ABC):
    """A Gymnasium environment with tasks to answer, and tools to use on the way.

    A subclass defines the `instruction` for the model, and `grade`, which decides whether an answer
    is right. An environment is used by one thread at a time, but not always by the same one.

    Args:
        tools: Tools that the model can call. A Python block calls the one named `python`.
        tasks: Tasks that `reset` draws from if it is not given one.
        instruction: Text before the question; "" for none, None for that of the class.
        max_turns: Number of turns after which an episode without an answer is truncated.
        call_format: How calls are written; see `tir_alp.tools.calls`. None: "fenced" if there is a
            tool named `python`, "tool_call" if there are only others, "none" without tools.
        max_calls: Number of calls that a turn may have; with fenced code, 1.
        parallel_calls: Whether the calls of a turn run at the same time, unless they share the
            session of a tool.
        tools_in_prompt: Whether the prompt describes the tools and how to call them. If not, the
            chat template has to; it finds the tools in `tool_schemas`.
        observation: Wording of observations; `{output}` stands for the output of the tool.
        shaping: Values of `RewardShaping`, by name; None for none.
        rewards: Functions that grade in place of `grade`, as `read_rewards` reads them. Every turn
            without a call is then an answer.
        render_mode: "ansi" if `render` is to return the text of the episode; None if not.
    """

    metadata: ClassVar[dict[str, Any]] = METADATA
    instruction: ClassVar[str] = ""
    """Text before the question; the setting of the same name overrides it."""
    task_keys: ClassVar[tuple[str, ...]] = ("question", "answer")
    """Keys that every task must have."""

    def __init__(
        self,
        *,
        tools: Sequence[Tool],
        tasks: TaskSource,
        instruction: str | None = None,
        max_turns: int = 5,
        call_format: CallFormat | None = None,
        max_calls: int = 1,
        parallel_calls: bool = False,
        tools_in_prompt: bool = False,
        observation: str = "{output}",
        shaping: Mapping[str, float] | None = None,
        rewards: Sequence[str | Mapping[str, Any]] = (),
        render_mode: str | None = None,
    ):
        if max_turns < 1:
            raise ValueError(f"max_turns is {max_turns}: an episode needs at least one turn")
        if not len(tasks):
            raise ValueError("there are no tasks to draw from")
        if call_format is None:
            names = [tool.name for tool in tools]
            call_format = "fenced" if "python" in names else "tool_call" if names else "none"
        if call_format not in CALL_FORMATS:
            raise ValueError(f"call_format is {call_format!r}; it must be one of {CALL_FORMATS}")
        if max_calls < 1 or (max_calls > 1 and call_format != "tool_call"):
            raise ValueError(
                f"max_calls is {max_calls}: with call_format = {call_format!r}, a turn has at most "
                f"{'any positive number' if call_format == 'tool_call' else 1}"
            )
        if "{output}" not in observation:
            raise ValueError(f"observation is {observation!r}: it must contain {{output}}")
        try:
            self._shaping = RewardShaping(**(shaping or {}))  # pyright: ignore[reportArgumentType]
        except TypeError as error:
            raise ValueError(f"env.kwargs.shaping: {error}") from None
        self._rewards = read_rewards(rewards)
        self.render_mode = render_mode
        self._transcript = Transcript(render_mode)
        self.observation_space = TextSpace()
        self.action_space = TextSpace()
        self.call_format: CallFormat = call_format
        self.max_calls = max_calls
        schemas = [function_schema(tool) for tool in tools]
        shown = call_format == "tool_call" and not tools_in_prompt
        self.tool_schemas: tuple[dict[str, Any], ...] = tuple(schemas) if shown else ()
        """Schemas that the chat template has to show to the model; empty if the prompt does so, or
        if calls do not need them."""
        self._preamble = [self.instruction if instruction is None else instruction]
        if tools_in_prompt:
            lines = "\n".join(json.dumps(schema["function"]) for schema in schemas)
            self._preamble.append(_TOOLS_TEXT.format(schemas=lines))
        self._tools = {tool.name: tool for tool in tools}
        if len(self._tools) < len(tools):
            names = sorted(tool.name for tool in tools)
            raise ValueError(f"the tools of an environment need different names, not {names}")
        self._calls = ToolCalls(self._tools, max_calls, is_parallel=parallel_calls)
        self._tasks = tasks
        self._max_turns = max_turns
        self._observation = observation
        self._task: dict[str, Any] | None = None  # None: no episode is under way
        self._recorded: Sequence[Mapping[str, Any] | None] | None = None
        self._num_turns = self._num_chars = self._good_calls = 0

    def prompt(self, task: Mapping[str, Any]) -> str:
        """Return the prompt of a task: the instruction, the tools and the question."""
        return "\n\n".join(text for text in (*self._preamble, task["question"]) if text)

    @abstractmethod
    def grade(self, task: Mapping[str, Any], answer: str) -> Grade:
        """Compare an answer with the truth. It may block, within a deadline of its own."""

    def answer_in(self, action: str) -> str | None:
        """Return the answer in a turn that contains no call, or None."""
        return boxed_answer(action, self.call_format)

    def gold_action(self, task: Mapping[str, Any]) -> str:
        """Return a turn with the right answer, which `python -m tir_alp.envs check` plays."""
        return f"\\boxed{{{task['answer']}}}"

    def wrong_action(self, task: Mapping[str, Any]) -> str:
        """Return a turn with a wrong answer, which `check` plays as well."""
        return r"\boxed{-1000001}"

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Begin an episode.

        Args:
            seed: Seed of the draw of a task.
            options: `{"task": {...}}` sets the task. Without it one is drawn, from a split if
                `split` is "train" or "held_out". To replay a recorded episode, `tool_results` has
                one entry per turn: None if no tool was called, else the fields of a `ToolResult`,
                which is used in place of the tool's, or a list of them for several calls.

        Returns:
            The prompt, and `{"task": {...}}` with the complete task, its answer included.
        """
        super().reset(seed=seed)
        self._end_episode()
        options = options or {}
        task = options.get("task")
        if task is None:
            task = self._draw(options.get("split"))
        missing = [key for key in self.task_keys if key not in task]
        if missing:
            raise ValueError(
                f"a task of {type(self).__name__} needs {' and '.join(map(repr, missing))}; "
                f"this one has only {sorted(task)}"
            )
        prompt = self.prompt(task)
        self._task = dict(task)
        self._num_turns = self._num_chars = self._good_calls = 0
        self._recorded = options.get("tool_results")
        self._transcript.begin(prompt)
        return prompt, {"task": copy.deepcopy(self._task)}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Play one turn of the model; the module's docstring describes what a turn may do.

        Raises:
            ResetNeeded: The episode has ended, or none has begun. Gymnasium leaves a step after the
                end undefined; here it would be a turn that nobody may train on.
        """
        if self._task is None:
            raise ResetNeeded("no episode is under way: call reset() before step()")
        self._num_turns += 1
        self._num_chars += len(action)
        observation, terminated, truncated = "", False, False
        earned: Mapping[str, float] = dict.fromkeys(
            [each.name for each in self._rewards] or ["answer"], 0.0
        )
        # One more than are run, so that the model reads that the others are not.
        calls = find_calls(action, self.call_format)[: self.max_calls + 1]
        turn = calls or parse_action(action, self.call_format, self._answer_of)
        match turn:
            case None:
                terminated = True
                info = StepInfo(void=True)
            case Answer(answer):
                grade = self._grade(self._task, answer, action)
                earned = grade.terms or {"answer": grade.reward}
                truncated = grade.outcome.is_infrastructure
                terminated = not truncated
                info = StepInfo(
                    outcome=grade.outcome.value,
                    answer=answer,
                    correct=grade.correct,
                    error=grade.error,
                )
            case _:
                results, observation = self._call_tools(calls)
                outcome, error, seconds = summary(results)
                self._good_calls += sum(each.outcome is Outcome.OK for each in results)
                truncated = outcome.is_infrastructure or self._num_turns >= self._max_turns
                info = StepInfo(
                    outcome=outcome.value,
                    tool_calls=len(calls),
                    bad_calls=sum(isinstance(each, BadCall) for each in calls),
                    error=error,
                    tool_s=seconds,
                    calls=[_to_row(each) for each in results] if len(calls) > 1 else [],
                )
        rewards: dict[str, float] = {}
        if terminated or truncated:
            if not Outcome(info.outcome).is_infrastructure:
                has_answer = isinstance(turn, Answer) and self.answer_in(action) is not None
                facts = EpisodeFacts(has_answer, self._good_calls, self._num_chars)
                rewards = reward_terms(earned, self._shaping, facts)
            self._end_episode()
        info = {**info.to_dict(), "rewards": rewards}
        self._transcript.add(action, observation)
        return observation, sum(rewards.values()), terminated, truncated, info

    def render(self) -> str | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the episode so far as text, if `render_mode` is "ansi"."""
        return self._transcript.render()

    def harmless_actions(self) -> tuple[str, ...]:
        """Return turns for a trainer to play before a run, so that what tools need starts or fails.

        There is one turn per tool that defines `harmless`, with a call that changes nothing.
        """
        calls = [
            ToolCall(tool.name, tool.harmless)
            for tool in self._tools.values()
            if isinstance(tool, TriedTool)
        ]
        turns = [write_call(call, self.call_format) for call in calls]
        return tuple(turn for turn in turns if turn is not None)

    def run_report(self) -> dict[str, Any]:
        """Report what the tools' calls run in.

        Returns:
            `{"tools": {name: {...}}, "warnings": [sentence, ...]}`, from the tools that report.
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

    def __getstate__(self) -> dict[str, Any]:
        if self._calls.sessions:
            raise TypeError(
                f"{type(self).__name__} cannot be pickled while it has an open session of "
                f"{' and '.join(map(repr, self._calls.sessions))}: pickle it before the first "
                "tool call of an episode, or after reset() or close()"
            )
        return dict(self.__dict__)

    def _answer_of(self, action: str) -> str | None:
        """As `answer_in`; for reward functions, a text without an answer is one itself."""
        answer = self.answer_in(action)
        return action if answer is None and self._rewards else answer

    def _grade(self, task: Mapping[str, Any], answer: str, action: str) -> Grade:
        if not self._rewards:
            return self.grade(task, answer)
        return grade_by(self._rewards, task, action, self.answer_in(action))

    def _draw(self, split: str | None) -> Mapping[str, Any]:
        """Draw a task, from a split if one is given."""
        for _ in range(_MAX_DRAWS):
            task = self._tasks[int(self.np_random.integers(len(self._tasks)))]
            if split is None or is_held_out(str(task["question"])) == (split == "held_out"):
                return task
        raise ValueError(
            f"{type(self).__name__} has too few different questions for a {split} split: none in "
            f"{_MAX_DRAWS} draws"
        )

    def _call_tools(self, calls: Sequence[ToolCall | BadCall]) -> tuple[list[ToolResult], str]:
        """Run calls, or take their recorded results; return results and observation."""
        if self._recorded is not None:
            turn = self._num_turns - 1
            recorded = self._recorded[turn] if turn < len(self._recorded) else None
            results = recorded_results(recorded, len(calls))
            if results is None:
                raise ValueError(
                    f"turn {turn} has a tool call, but tool_results has no result for it"
                )
        else:
            results = [
                replace(each, text=self._observation.replace("{output}", each.text))
                for each in self._calls.run(calls)
            ]
        return results, "\n".join(each.text for each in results)

    def _end_episode(self) -> None:
        self._task = None
        self._calls.close()


def _to_row(result: ToolResult) -> dict[str, Any]:
    return {
        "outcome": result.outcome.value,
        "text": result.text,
        "duration_s": result.duration_s,
        "error": result.error,
    }
