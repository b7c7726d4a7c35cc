"""Symbolic mathematics as a tool: a few operations of sympy, run in the Python sandbox.

sympy parses an expression by evaluating it as a program, which may never end. So it runs where the
programs of a model run: within the sandbox and its limits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tir_alp.tools.base import ToolReport, ToolResult, ToolSession
from tir_alp.tools.python_tool import PythonTool, PythonToolSession
from tir_alp.tools.sandbox import Limits, SandboxConfig

OPERATIONS = {
    "simplify": "sympy.simplify(expression)",
    "expand": "sympy.expand(expression)",
    "factor": "sympy.factor(expression)",
    "solve": "sympy.solve(expression, variable)",
    "differentiate": "sympy.diff(expression, variable)",
    "integrate": "sympy.integrate(expression, variable)",
}


class SympyTool:
    """Applies an operation of sympy to an expression."""

    name = "sympy"
    description = (
        "Applies an operation of sympy to an expression. `solve` finds where it is zero; "
        "`variable` is for solve, differentiate and integrate."
    )
    parameters: Mapping[str, Any] = {
        "type": "object",
        "properties": {
            "operation": {"type": "string", "enum": list(OPERATIONS)},
            "expression": {"type": "string", "description": "For example x**2 - 1"},
            "variable": {"type": "string", "description": "For example x, which is the default"},
        },
        "required": ["operation", "expression"],
        "additionalProperties": False,
    }
    harmless: Mapping[str, Any] = {"operation": "factor", "expression": "x**2 - 1"}

    def __init__(
        self,
        sandbox: SandboxConfig | Mapping[str, Any] | None = None,
        *,
        limits: Limits | Mapping[str, Any] | None = None,
    ) -> None:
        """Check the settings; they are those of `PythonTool`."""
        self._python = PythonTool(sandbox, limits=limits)

    def open_session(self) -> PythonToolSession:
        """A session whose interpreter is not started yet."""
        return self._python.open_session()

    def report(self) -> ToolReport:
        """See `PythonTool.report`."""
        return self._python.report()

    def run(self, arguments: Mapping[str, Any], session: ToolSession) -> ToolResult:
        """Apply `arguments["operation"]`."""
        code = (
            "import sympy\n"
            f"variable = sympy.Symbol({arguments.get('variable', 'x')!r})\n"
            f"expression = sympy.sympify({arguments['expression']!r})\n"
            f"print({OPERATIONS[arguments['operation']]})"
        )
        return self._python.run({"code": code}, session)
