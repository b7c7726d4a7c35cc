"""The protocol that a tool implements, and what a call returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from tir_alp.tools.outcome import Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolResult:
    """The result of one tool call.

    Example: `print(6 * 7)` gives `ToolResult(outcome=Outcome.OK, text="42", duration_s=0.0002)`.
    """

    outcome: Outcome
    text: str
    """What the model reads; already cut to the observation limit."""
    duration_s: float
    """Wall-clock seconds from the call to the answer, queueing included."""
    error: str = ""
    """For people: what failed, as the failing component describes it. Empty if nothing failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolReport:
    """Where the calls of a tool run.

    Example: `ToolReport(runs_in={"sandbox": "namespaces", "refused": {}})`.
    """

    runs_in: Mapping[str, Any]
    """For people; written as JSON."""
    warnings: tuple[str, ...] = ()
    """Whole sentences that must not be overlooked."""


class ToolSession(Protocol):
    """The state that one episode keeps between its tool calls, e.g. a live interpreter."""

    def close(self) -> None:
        """Free what the session holds. Closing twice is allowed."""
        ...


class NoSession:
    """The session of a tool that keeps nothing between calls."""

    def close(self) -> None:
        """Do nothing."""


class Tool(Protocol):
    """One thing that a model can call.

    `run` never raises because of what the model wrote: bad arguments and failing programs are
    results with an outcome. It returns within the tool's own deadline, whatever the program does.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    """JSON schema of `arguments`."""

    def open_session(self) -> ToolSession:
        """Make the state of one episode. Cheap: nothing heavy starts before the first call."""
        ...

    def run(self, arguments: Mapping[str, Any], session: ToolSession) -> ToolResult:
        """Call the tool once. Blocks; called from a thread of the rollout's own pool."""
        ...


def refused_call(error: str) -> ToolResult:
    """The result of a call that could not be made; the model reads why and may correct it."""
    return ToolResult(
        outcome=Outcome.TOOL_ERROR, text=f"Error: {error}", duration_s=0.0, error=error
    )


def function_schema(tool: Tool) -> dict[str, Any]:
    """Describe a tool in the form that chat templates expect in `tools`."""
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": dict(tool.parameters),
    }
    return {"type": "function", "function": function}


@runtime_checkable
class TriedTool(Protocol):
    """A tool that is tried before a run begins, so that whatever it needs starts or fails then."""

    harmless: Mapping[str, Any]
    """Arguments of a call that changes nothing and works wherever the tool works."""


@runtime_checkable
class ReportingTool(Protocol):
    """A tool that can report where its calls run."""

    def report(self) -> ToolReport:
        """What a run should print and record. Starts what a first call would start."""
        ...
