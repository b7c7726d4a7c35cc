"""`PythonMath-v0`: one mathematical question, a Python tool, one answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tir_alp.envs.grading import Grade, grade
from tir_alp.envs.tasks import ArithmeticTasks, TaskSource
from tir_alp.envs.tool_env import ToolEnv
from tir_alp.tools.python_tool import PythonTool

INSTRUCTION = """\
Solve the problem step by step. You may write Python code in a block that begins with a line \
```python and ends with a line ```. The block is run as soon as it is complete, and you are shown \
what it prints; then go on. When you know the answer, write it in \\boxed{}."""


class PythonMathEnv(ToolEnv):
    r"""A question whose answer is a number or an expression; reward 1 if it is right, else 0.

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
        instruction: text before the question, which says what the model may do; "" for none.
        sandbox: settings of the sandbox that runs the code; None for the defaults.
        max_turns: turns after which an episode without an answer is truncated.
        tasks: where `reset` draws from when it is not given a task; default: endless arithmetic.
    """

    def __init__(
        self,
        *,
        instruction: str = INSTRUCTION,
        sandbox: Mapping[str, Any] | None = None,
        max_turns: int = 5,
        tasks: TaskSource | None = None,
    ):
        super().__init__(
            tools=[PythonTool(sandbox=sandbox)],
            tasks=ArithmeticTasks(seed=0, size=2**31) if tasks is None else tasks,
            max_turns=max_turns,
        )
        self._instruction = instruction

    def prompt(self, task: Mapping[str, Any]) -> str:
        """Return the instruction and the question."""
        missing = [key for key in ("question", "answer") if key not in task]
        if missing:
            raise ValueError(
                f"a task of PythonMath needs {' and '.join(map(repr, missing))}; "
                f"this one has only {sorted(task)}"
            )
        question = task["question"]
        return f"{self._instruction}\n\n{question}" if self._instruction else question

    def grade(self, task: Mapping[str, Any], answer: str) -> Grade:
        """Compare with the task's answer, as mathematics."""
        return grade(answer, str(task["answer"]))
