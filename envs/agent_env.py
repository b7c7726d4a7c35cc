"""`Agent-v0`: an episode is a whole agent, which finds the model at a URL.

`reset` returns the task as JSON. `play` runs the agent, which talks to the model itself, and
returns a report of what it left; `step` grades that report, ends the episode, and starts nothing:
a recorded episode is graded again without the agent.
"""

from __future__ import annotations

import importlib
import inspect
import json
import shlex
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any, ClassVar

import gymnasium
from gymnasium.error import ResetNeeded

from tir_alp.envs.agent_container import ContainerPlace, run_container
from tir_alp.envs.agent_process import AgentFunction, Report, run_command, run_function
from tir_alp.envs.grading import Grade, grade
from tir_alp.envs.math_env import ENDLESS_ARITHMETIC
from tir_alp.envs.spaces import TextSpace
from tir_alp.envs.tasks import TaskSource
from tir_alp.envs.tool_env import StepInfo
from tir_alp.envs.transcript import METADATA, Transcript
from tir_alp.tools.boxed import extract_boxed
from tir_alp.tools.outcome import Outcome

Verifier = Callable[[Mapping[str, Any], Mapping[str, Any]], Any]
"""Is called with the task and the report; returns a reward, or a `Grade`."""

_HIDDEN = ("answer", "tests", "metadata")
_ENDS = {
    "exited": Outcome.OK,
    "failed": Outcome.TOOL_ERROR,
    "timeout": Outcome.TOOL_TIMEOUT,
    "infrastructure": Outcome.INFRA_ERROR,
}


class AgentEnv(gymnasium.Env[str, str]):
    """A task and an agent that works on it.

    Args:
        command: Command of the agent, as words or as a line for `shlex.split`. It finds the model
            by `OPENAI_BASE_URL`, `OPENAI_API_KEY`, `ANTHROPIC_BASE_URL` and `ANTHROPIC_API_KEY`,
            and the task by `TIR_ALP_TASK` (JSON) and the file `task.json` in its folder. Its answer
            is its file `answer.txt`, or the last line that it prints.
        image: Image of a container in which the command runs; without a command, that of the image
            does. It finds the task, and leaves its files, in `/episode` (`TIR_ALP_FOLDER`), and
            shares the network of this machine.
        container: Further options of the container, as `containers.create` of Docker's Python SDK
            takes them.
        function: In place of a command, `module:NAME` of an async function. It is called with the
            task and a dict of the same variables, and returns the answer.
        verifier: `answer` compares the answer with the task's as mathematics; `module:NAME` is a
            function of the task and the report (a dict) that returns the reward, or a `Grade`.
        timeout_s: Deadline of the agent, in seconds.
        files: Names of files in the agent's folder that the verifier wants to read.
        hidden: Keys of the task that the agent is not shown.
        tasks: Tasks that `reset` draws from if it is not given one; default: endless arithmetic.
        render_mode: "ansi" if `render` is to return the text of the episode; None if not.
    """

    metadata: ClassVar[dict[str, Any]] = METADATA
    call_format: ClassVar[str] = "none"

    def __init__(
        self,
        *,
        command: str | Sequence[str] | None = None,
        image: str | None = None,
        container: Mapping[str, Any] | None = None,
        function: str | None = None,
        verifier: str = "answer",
        timeout_s: float = 300.0,
        files: Sequence[str] = (),
        hidden: Sequence[str] = _HIDDEN,
        tasks: TaskSource | None = None,
        render_mode: str | None = None,
    ):
        if (command is None and image is None) == (function is None):
            raise ValueError(
                "env.kwargs needs one of command and function: the agent is a command, which may "
                "run in an image, or an async function"
            )
        self._place = _place(image, container)
        if timeout_s <= 0:
            raise ValueError(f"env.kwargs.timeout_s is {timeout_s}; it must be above 0")
        self._command = shlex.split(command) if isinstance(command, str) else [*(command or ())]
        if self._command[:1] == ["python"] and image is None:
            self._command[0] = sys.executable
        self._function: AgentFunction | None = (
            None if function is None else _found(function, "function")
        )
        if inspect.isfunction(self._function) and not inspect.iscoroutinefunction(self._function):
            raise ValueError(f"env.kwargs.function: {function} must be async, as in `async def`")
        self._verifier: Verifier = (
            _compare_answer if verifier == "answer" else _found(verifier, "verifier")
        )
        self.timeout_s = timeout_s
        self._files, self._hidden = tuple(files), frozenset(hidden)
        self._tasks = ENDLESS_ARITHMETIC if tasks is None else tasks
        self.render_mode = render_mode
        self._transcript = Transcript(render_mode)
        self.observation_space, self.action_space = TextSpace(), TextSpace()
        self._task: dict[str, Any] | None = None
        self._stop = threading.Event()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Begin an episode; `options={"task": {...}}` sets the task, without it one is drawn."""
        super().reset(seed=seed)
        task = (options or {}).get("task")
        if task is None:
            task = self._tasks[int(self.np_random.integers(len(self._tasks)))]
        self._task = dict(task)
        prompt = json.dumps(self.shown_task(), ensure_ascii=False)
        self._transcript.begin(prompt)
        return prompt, {"task": dict(self._task)}

    def shown_task(self) -> dict[str, Any]:
        """Return the task as the agent is shown it."""
        if self._task is None:
            raise ResetNeeded("no episode is under way: call reset() first")
        return {name: value for name, value in self._task.items() if name not in self._hidden}

    def play(self, variables: Mapping[str, str]) -> str:
        """Run the agent to its end, which blocks; return its report for `step`.

        Args:
            variables: Environment variables by which the agent finds the model.
        """
        task = self.shown_task()
        if self._function is not None:
            report = run_function(
                self._function, task, variables, self.timeout_s, self._stop.is_set
            )
        else:
            run = partial(run_container, self._place) if self._place else run_command
            report = run(
                self._command, task, variables, self.timeout_s, self._stop.is_set, self._files
            )
        return report.to_text()

    def stop(self) -> None:
        """End the agent, from another thread; `play` returns soon."""
        self._stop.set()

    def close(self) -> None:
        """End the agent."""
        self.stop()

    @property
    def gold_action(self) -> Callable[[Mapping[str, Any]], str] | None:
        """Returns the report of an agent that is right; None: a verifier of one's own decides."""
        if self._verifier is not _compare_answer:
            return None
        return lambda task: Report(answer=str(task["answer"])).to_text()

    @property
    def wrong_action(self) -> Callable[[Mapping[str, Any]], str] | None:
        """Returns the report of an agent that is wrong; None: as `gold_action`."""
        return None if self.gold_action is None else lambda task: self.harmless_actions()[0]

    def harmless_actions(self) -> tuple[str, ...]:
        """Return reports that a check can have graded."""
        return (Report(answer="-1000001").to_text(),)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Grade the report of the agent, or an answer alone, and end the episode."""
        if self._task is None:
            raise ResetNeeded("no episode is under way: call reset() before step()")
        task, self._task = self._task, None
        report = Report.from_text(action)
        outcome = _ENDS.get(report.end, Outcome.INFRA_ERROR)
        found = Grade(correct=False)
        if outcome in (Outcome.OK, Outcome.TOOL_ERROR):
            found = self._grade(task, report)
        error = found.error or (report.errors[-500:] if outcome is not Outcome.OK else "")
        if found.outcome is not Outcome.OK:
            outcome = found.outcome
        is_broken = outcome.is_infrastructure
        info = StepInfo(
            outcome=outcome.value,
            answer=report.answer,
            correct=None if is_broken else found.correct,
            error=error,
            rewards={} if is_broken else dict(found.terms or {"answer": found.reward}),
        )
        self._transcript.add(action, "")
        late = outcome is Outcome.TOOL_TIMEOUT
        reward = 0.0 if is_broken else found.reward
        return "", reward, not late and not is_broken, late or is_broken, info.to_dict()

    def _grade(self, task: Mapping[str, Any], report: Report) -> Grade:
        fields = json.loads(report.to_text())
        try:
            verdict = self._verifier(task, fields)
        except Exception as error:  # a verifier may raise anything, and none is a verdict
            return Grade(None, Outcome.GRADER_ERROR, f"the verifier raised {error!r}")
        if isinstance(verdict, Grade):
            return verdict
        reward = float(verdict)
        return Grade(correct=reward > 0, score=reward)

    def render(self) -> str | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the episode so far as text, if `render_mode` is "ansi"."""
        return self._transcript.render()


def _place(image: str | None, options: Mapping[str, Any] | None) -> ContainerPlace | None:
    if image is None:
        if options:
            raise ValueError("env.kwargs.container needs env.kwargs.image")
        return None
    if find_spec("docker") is None:
        raise ValueError("env.kwargs.image needs docker: pip install 'tir_alp[docker]'")
    return ContainerPlace(image, dict(options or {}))


def _compare_answer(task: Mapping[str, Any], report: Mapping[str, Any]) -> Grade:
    if "answer" not in task:
        raise ValueError("the task has no answer; set env.kwargs.verifier to a function of yours")
    answer = report["answer"]
    if not answer:
        return Grade(correct=False)
    return grade(extract_boxed(answer) or answer, str(task["answer"]))


def _found(name: str, key: str) -> Any:
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"env.kwargs.{key} is {name!r}, which must be the module:NAME of a function: {error}"
        ) from error
