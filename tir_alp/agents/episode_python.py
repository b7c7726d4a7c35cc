"""The sandboxed Python of one episode, for agents that have no sandbox of their own.

An episode has one interpreter, whichever way its agent calls it: the gateway offers it as an MCP
server and as a function. Nothing is started before the first call. What a call prints reaches the
model as a message of the client, and is never trained on.
"""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from typing import Any

from tir_alp.tools.base import Tool, ToolResult
from tir_alp.tools.outcome import Outcome
from tir_alp.tools.sandbox import SandboxError

MAX_WAITING = 64
"""Calls of one episode that may wait for its interpreter; one more is refused."""


class TooManyCalls(Exception):
    """The episode has too many calls that wait."""


class EpisodePython:
    """One episode's use of the tool. Its calls run one after another.

    Args:
        tool: The tool, which all episodes share.
        threads: Where calls block.
        on_failure: Is told when the sandbox failed: the episode is then not to be trained on.
    """

    def __init__(self, tool: Tool, threads: Executor, on_failure: Callable[[str], None]) -> None:
        self._tool, self._threads, self._on_failure = tool, threads, on_failure
        self._session = tool.open_session()
        self._turn = asyncio.Lock()
        self._num_waiting = 0
        self._is_used = self._is_closed = False

    @property
    def name(self) -> str:
        """Name of the tool."""
        return self._tool.name

    @property
    def description(self) -> str:
        """What the model reads about it."""
        return self._tool.description

    @property
    def parameters(self) -> dict[str, Any]:
        """JSON schema of its arguments."""
        return dict(self._tool.parameters)

    def schema(self) -> dict[str, Any]:
        """Return it as a function in OpenAI's form."""
        function = {
            "name": self.name,
            "description": self.description,
            "parameters": self.parameters,
        }
        return {"type": "function", "function": function}

    async def run(self, arguments: Mapping[str, Any]) -> ToolResult:
        """Make a call. What the model wrote is never an error, but a result with an outcome.

        Raises:
            TooManyCalls: Too many calls wait already, or the episode has ended.
        """
        if self._is_closed or self._num_waiting >= MAX_WAITING:
            raise TooManyCalls(
                "the episode has ended"
                if self._is_closed
                else f"{MAX_WAITING} calls of the episode wait for its interpreter; try later"
            )
        self._num_waiting += 1
        try:
            async with self._turn:
                if self._is_closed:
                    raise TooManyCalls("the episode has ended")
                self._is_used = True
                call = functools.partial(self._tool.run, arguments, self._session)
                running = asyncio.get_running_loop().run_in_executor(self._threads, call)
                # Whoever asked may go away; the interpreter is busy until the call has ended.
                result = await _to_the_end(running)
        except SandboxError as error:
            text = "[the tool is not available]"
            result = ToolResult(
                outcome=Outcome.INFRA_ERROR, text=text, duration_s=0.0, error=str(error)
            )
        finally:
            self._num_waiting -= 1
        if result.outcome.is_infrastructure and not self._is_closed:
            self._on_failure(f"the sandbox failed: {result.error}")
        return result

    async def close(self) -> None:
        """Refuse further calls and end the interpreter, also in the middle of a call."""
        self._is_closed = True
        if not self._is_used:
            return
        await asyncio.to_thread(self._session.close)
        async with self._turn:  # a call may just have started an interpreter
            await asyncio.to_thread(self._session.close)


async def _to_the_end(running: asyncio.Future[ToolResult]) -> ToolResult:
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait({running})
        raise


def read_arguments(data: bytes | str) -> Mapping[str, Any] | str:
    """Return the arguments of a call, which may be text in JSON, or what is wrong with them."""
    try:
        arguments = json.loads(data)
        if isinstance(arguments, str):  # as a reply has them
            arguments = json.loads(arguments)
    except (ValueError, RecursionError) as error:
        return f"the arguments are not JSON: {error}"
    if not isinstance(arguments, dict):
        return f"the arguments are not a JSON object: {arguments!r:.60}"
    return arguments
