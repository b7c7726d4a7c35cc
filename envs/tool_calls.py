"""Runs the tool calls of a turn: in order, or at the same time where that changes nothing.

Calls that share a session depend on one another's order, so only calls of different tools, and of
tools that keep nothing between calls, run at the same time.
"""

from __future__ import annotations

import contextvars
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tir_alp.tools.arguments import ArgumentCheck
from tir_alp.tools.base import NoSession, Tool, ToolResult, ToolSession, refused_call
from tir_alp.tools.calls import BadCall, ToolCall
from tir_alp.tools.outcome import Outcome

_MAX_THREADS = 16


class ToolCalls:
    """The tools of an environment, and the sessions that an episode has opened with them.

    Args:
        tools: The tools, by name.
        max_calls: Number of calls of one turn that are run; the others are refused.
        is_parallel: Whether calls of one turn that share no session run at the same time.
    """

    def __init__(self, tools: Mapping[str, Tool], max_calls: int, *, is_parallel: bool) -> None:
        self._tools = tools
        self._checks = {name: ArgumentCheck(name, tool.parameters) for name, tool in tools.items()}
        self._max_calls = max_calls
        self._is_parallel = is_parallel
        self.sessions: dict[str, ToolSession] = {}

    def run(self, calls: Sequence[ToolCall | BadCall]) -> list[ToolResult]:
        """Run the calls of a turn; return their results in the same order."""
        errors = [self._error(call, number) for number, call in enumerate(calls)]
        queues: dict[str, list[int]] = {}  # calls that must run in order
        for index, (call, error) in enumerate(zip(calls, errors, strict=True)):
            if error or isinstance(call, BadCall):
                continue
            session = self._session(call.name)
            is_alone = self._is_parallel and isinstance(session, NoSession)
            key = f"{call.name} {index}" if is_alone else call.name if self._is_parallel else ""
            queues.setdefault(key, []).append(index)
        results = [refused_call(error) for error in errors]

        def run_queue(indices: Sequence[int]) -> None:
            for index in indices:
                call = calls[index]
                assert isinstance(call, ToolCall)
                tool = self._tools[call.name]
                results[index] = tool.run(call.arguments, self.sessions[call.name])

        if len(queues) < 2:
            for indices in queues.values():
                run_queue(indices)
        else:
            with ThreadPoolExecutor(min(len(queues), _MAX_THREADS)) as threads:
                contexts = [contextvars.copy_context() for _ in queues]
                runs = [
                    threads.submit(context.run, run_queue, indices)
                    for context, indices in zip(contexts, queues.values(), strict=True)
                ]
            for each in runs:
                each.result()
        return results

    def close(self) -> None:
        """Close the sessions."""
        while self.sessions:
            _, session = self.sessions.popitem()
            session.close()

    def _session(self, name: str) -> ToolSession:
        if name not in self.sessions:
            self.sessions[name] = self._tools[name].open_session()
        return self.sessions[name]

    def _error(self, call: ToolCall | BadCall, number: int) -> str:
        """Return why a call is refused; empty if it is not."""
        if isinstance(call, BadCall):
            return call.error
        if number >= self._max_calls:
            number_run = "one call" if self._max_calls == 1 else f"{self._max_calls} calls"
            return f"at most {number_run} of a turn can be run; this one and any after it were not"
        if call.name not in self._tools:
            return f"there is no tool named {call.name[:100]!r}; there are: {sorted(self._tools)}"
        if error := self._checks[call.name].error(call.arguments):
            return f"the arguments of {call.name!r} do not fit: {error}"
        return ""


def summary(results: Sequence[ToolResult]) -> tuple[Outcome, str, float]:
    """Return how the calls of a turn ended as a whole: outcome, error and seconds.

    The outcome is the first of an infrastructure failure, of another failure, and `OK`. The errors
    are joined.
    """
    failed = [each for each in results if each.outcome is not Outcome.OK]
    broken = [each for each in failed if each.outcome.is_infrastructure]
    outcome = next((each.outcome for each in (*broken, *failed)), Outcome.OK)
    error = "; ".join(each.error for each in failed if each.error)
    return outcome, error, sum(each.duration_s for each in results)


def recorded_results(recorded: Any, count: int) -> list[ToolResult] | None:
    """Return the recorded results of the calls in a turn; None if they are not those.

    Args:
        recorded: The fields of a `ToolResult`, or a list of them for several calls.
        count: Number of calls.
    """
    rows = recorded if isinstance(recorded, list) else [recorded]
    if recorded is None or len(rows) != count:
        return None
    return [ToolResult(**{**row, "outcome": Outcome(row["outcome"])}) for row in rows]
