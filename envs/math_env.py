"""`PythonMath-v0` and `SingleTurnMath-v0`: one mathematical question, one answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Unpack

from tir_alp.envs.grading import Grade, grade
from tir_alp.envs.tasks import ArithmeticTasks, TaskSource
from tir_alp.envs.tool_env import EnvSettings, ToolEnv
from tir_alp.tools.python_tool import PythonTool

ENDLESS_ARITHMETIC = ArithmeticTasks(seed=0, size=2**31)
"""Tasks that `reset` draws from if the environment is given neither a task nor a source."""


class PythonMathEnv(ToolEnv):
    r"""A question whose answer is a number or an expression, and a Python tool.

    Example:
        >>> import gymnasium
        >>> env = gymnasium.make("tir_alp.envs:PythonMath-v0", instruction="")
        >>> task = {"question": "What is 6*7?", "answer": "42"}
        >>> env.reset(options={"task": task})[0]
        'What is 6*7?'
        >>> env.step("```python\nprint(6*7)\n```")[0]
        '42'
        >>> env.step(r"It is \boxed{42}.")[1]
        1.0

    Args:
        sandbox: Settings of the sandbox that runs the code; None for the defaults.
        stateful: Whether variables persist between the calls of an episode.
        tasks: Tasks that `reset` draws from if it is not given one; default: endless arithmetic.
        settings: Settings of `ToolEnv`.
    """

    instruction: ClassVar[str] = """\
Solve the problem step by step. You may write Python code in a block that begins with a line \
```python and ends with a line ```. The block is run as soon as it is complete, and you are shown \
what it prints; then go on. When you know the answer, write it in \\boxed{}."""

    def __init__(
        self,
        *,
        sandbox: Mapping[str, Any] | None = None,
        stateful: bool = True,
        tasks: TaskSource | None = None,
        **settings: Unpack[EnvSettings],
    ):
        tools = [PythonTool(sandbox=sandbox, stateful=stateful)]
        super().__init__(
            tools=tools, tasks=ENDLESS_ARITHMETIC if tasks is None else tasks, **settings
        )

    def grade(self, task: Mapping[str, Any], answer: str) -> Grade:
        """Compare the answer with the task's, as mathematics."""
        return grade(answer, str(task["answer"]))


class SingleTurnMathEnv(ToolEnv):
    r"""A question whose answer is a number or an expression, to be answered in one turn, no tools.

    Code is not run, and a box inside a code block is not an answer.

    Args:
        tasks: Tasks that `reset` draws from if it is not given one; default: endless arithmetic.
        instruction: Text before the question; "" for none, None for the default.
        shaping: Reward shaping, as in `ToolEnv`.
        rewards: Reward functions, as in `ToolEnv`.
        render_mode: "ansi" or None, as in `ToolEnv`.
    """

    instruction: ClassVar[str] = (
        "Solve the problem step by step, and write the answer in \\boxed{}."
    )

    def __init__(
        self,
        *,
        tasks: TaskSource | None = None,
        instruction: str | None = None,
        shaping: Mapping[str, float] | None = None,
        rewards: Sequence[str | Mapping[str, Any]] = (),
        render_mode: str | None = None,
    ):
        super().__init__(
            tools=[],
            tasks=ENDLESS_ARITHMETIC if tasks is None else tasks,
            instruction=instruction,
            max_turns=1,
            call_format="none",
            shaping=shaping,
            rewards=rewards,
            render_mode=render_mode,
        )

    def grade(self, task: Mapping[str, Any], answer: str) -> Grade:
        """Compare the answer with the task's, as mathematics."""
        return grade(answer, str(task["answer"]))
