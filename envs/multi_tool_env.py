"""`MultiTool-v0`: a mathematical question and several tools, called in JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Unpack

from pydantic import ValidationError

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
"""Maps the name of a tool to a function that makes it, given the settings of the sandbox."""


class MultiToolEnv(ToolEnv):
    r"""A question whose answer is a number or an expression, and tools to choose from.

    Args:
        tools: Names of tools in `TOOLS`.
        mcp: MCP servers whose tools are added. Each is a dict with the fields of
            `tir_alp.tools.mcp.McpServer`, and optionally `only`, the names of the tools to use.
        sandbox: Settings of the sandbox that runs code; None for the defaults.
        tasks: Tasks that `reset` draws from if it is not given one; default: endless arithmetic.
        settings: Settings of `ToolEnv`; `call_format` defaults to `tool_call`.
    """

    instruction: ClassVar[str] = (
        "Solve the problem step by step. Use the tools where they help, one call at a time. When "
        "you know the answer, write it in \\boxed{}."
    )

    def __init__(
        self,
        *,
        tools: Sequence[str] = tuple(TOOLS),
        mcp: Sequence[Mapping[str, Any]] = (),
        sandbox: Mapping[str, Any] | None = None,
        tasks: TaskSource | None = None,
        **settings: Unpack[EnvSettings],
    ):
        unknown = [name for name in tools if name not in TOOLS]
        if unknown:
            raise ValueError(f"there is no tool {unknown[0]!r}; there are: {', '.join(TOOLS)}")
        settings.setdefault("call_format", "tool_call")
        super().__init__(
            tools=[*(TOOLS[name](sandbox) for name in tools), *_tools_of(mcp)],
            tasks=ENDLESS_ARITHMETIC if tasks is None else tasks,
            **settings,
        )

    def grade(self, task: Mapping[str, Any], answer: str) -> Grade:
        """Compare the answer with the task's, as mathematics."""
        return grade(answer, str(task["answer"]))


def _tools_of(servers: Sequence[Mapping[str, Any]]) -> list[Tool]:
    """Return the tools of MCP servers, given their settings in the config.

    Raises:
        ValueError: The message begins with the key path in the config, and names the fault.
    """
    if not servers:
        return []
    if isinstance(servers, Mapping | str) or not all(isinstance(each, Mapping) for each in servers):
        raise ValueError(
            f"env.kwargs.mcp is a list of servers, [[env.kwargs.mcp]] in TOML, not {servers!r:.100}"
        )
    try:
        from tir_alp.tools.mcp import McpError, mcp_tools
    except ImportError as error:
        raise ValueError(f"env.kwargs.mcp: {error}: pip install 'tir_alp[mcp]'") from error
    found: list[Tool] = []
    for index, server in enumerate(servers):
        settings = dict(server)
        only = settings.pop("only", None)
        try:
            found += mcp_tools(settings, only)
        except ValidationError as error:
            faults = "; ".join(
                ": ".join([*map(str, each["loc"]), each["msg"]]) for each in error.errors()
            )
            raise ValueError(f"env.kwargs.mcp[{index}]: {faults}") from error
        except (McpError, ValueError) as error:
            raise ValueError(f"env.kwargs.mcp[{index}]: {error}") from error
    return found
