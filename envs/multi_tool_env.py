"""`MultiTool-v0`: one mathematical question and several tools, called in JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Unpack

from tir_alp.envs.grading import Grade, grade
from tir_alp.envs.math_env import ENDLESS_ARITHMETIC
from tir_alp.envs.tasks import TaskSource
from tir_alp.envs.tool_env import EnvSettings, ToolEnv
from tir_alp.tools.base import Tool
from tir_alp.tools.calculator import CalculatorTool
from tir_alp.tools.python_tool import PythonTool
from tir_alp.tools.sympy_tool import SympyTool

TOOLS: dict[str, Callable[[Mapping[str, Any] | None], Tool]] = {
    "python": PythonTool,
    "calculator": lambda sandbox: CalculatorTool(),
    "sympy": SympyTool,
}
"""By name, made with the settings of the sandbox."""


class MultiToolEnv(ToolEnv):
    r"""A question whose answer is a number or an expression, and tools to choose from.

    Args:
        tools: names of `TOOLS`.
        sandbox: settings of the sandbox that runs code; None for the defaults.
        tasks: where `reset` draws from when it is not given a task; default: endless arithmetic.
        settings: those of `ToolEnv`; calls are native ones unless `call_format` says otherwise.
    """

    instruction: ClassVar[str] = (
        "Solve the problem step by step. Use the tools where they help, one call at a time. When "
        "you know the answer, write it in \\boxed{}."
    )

    def __init__(
        self,
        *,
        tools: Sequence[str] = tuple(TOOLS),
        sandbox: Mapping[str, Any] | None = None,
        tasks: TaskSource | None = None,
        **settings: Unpack[EnvSettings],
    ):
        unknown = [name for name in tools if name not in TOOLS]
        if unknown:
            raise ValueError(f"there is no tool {unknown[0]!r}; there are: {', '.join(TOOLS)}")
        settings.setdefault("call_format", "tool_call")
        super().__init__(
            tools=[TOOLS[name](sandbox) for name in tools],
            tasks=ENDLESS_ARITHMETIC if tasks is None else tasks,
            **settings,
        )

    def grade(self, task: Mapping[str, Any], answer: str) -> Grade:
        """Compare with the task's answer, as mathematics."""
        return grade(answer, str(task["answer"]))
