"""One live connection to an MCP server, and the processes of a server that is started here.

The protocol is asynchronous and environments are not: all connections live in one event loop, in
one thread. The first connection starts the thread and the last one ends it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import os
import signal
import tempfile
import threading
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import httpx2
from mcp import Client, StdioServerParameters
from mcp.client.stdio import stdio_client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.exceptions import MCPError
from mcp.types import CONNECTION_CLOSED, REQUEST_TIMEOUT, CallToolResult, TextContent, Tool
from pydantic import BaseModel, ConfigDict, Field, model_validator

from tir_alp.tools.background_loop import BackgroundLoop
from tir_alp.tools.mcp_lines import tolerant
from tir_alp.tools.outcome import Outcome
from tir_alp.tools.python_tool import NO_OUTPUT

_T = TypeVar("_T")
_CLOSE_TIMEOUT_S = 15.0
"""The library asks a server to end, then terminates it, then kills it: 7 seconds at most."""
_PROBE_TIMEOUT_S = 5.0
_MARGIN_S = 5.0
"""By how much the loop may be late with a deadline of its own."""
_STDERR_CHARS = 2000
_PID_CHARS = 32
_LOOK_EVERY_S = 0.001

# The shell prints its process id, which is also that of its group, and becomes the server.
_PRINT_PID = 'echo "$$" >&2; exec "$@"'


class McpError(Exception):
    """A server could not be started, reached or listed, or is gone. The message is for people."""


class McpServer(BaseModel):
    """Where a server is, and how long it may take.

    Example: `McpServer(command=("mcp-server-time", "--local-timezone", "UTC"))`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    command: tuple[str, ...] = ()
    """Command that starts a server which speaks over stdin and stdout. Either this or `url`."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment variables of the server, beside HOME, LOGNAME, PATH, SHELL, TERM and USER."""
    cwd: str | None = None
    """Working directory of the server; None means that of this process."""
    url: str | None = None
    """Address of a server that speaks streamable HTTP, such as "http://127.0.0.1:8000/mcp"."""
    headers: dict[str, str] = Field(default_factory=dict)
    """Headers of every HTTP request, such as an authorization."""
    shared: bool = False
    """Whether all environments of this process share one connection, which saves one start per
    episode. Only for servers without state: episodes would see each other's."""
    start_timeout_s: float = Field(default=30.0, gt=0)
    """Seconds to start, connect and list the tools."""
    call_timeout_s: float = Field(default=30.0, gt=0)
    """Seconds for one call."""
    max_output_chars: int = Field(default=4096, ge=1)
    """Length of the text that the model reads, in characters; a longer one loses its middle."""

    @model_validator(mode="after")
    def _check_transport(self) -> McpServer:
        if bool(self.command) == bool(self.url):
            raise ValueError("an MCP server has either a command (stdio) or a url (HTTP)")
        for name, needs in (("env", "command"), ("cwd", "command"), ("headers", "url")):
            if getattr(self, name) and not getattr(self, needs):
                raise ValueError(f"{name} is for an MCP server with a {needs}")
        return self

    @property
    def identity(self) -> str:
        """Equal for settings that lead to the same tools."""
        return self.model_dump_json(include={"command", "env", "cwd", "url", "headers"})

    def __str__(self) -> str:
        return f"the MCP server {self.url or ' '.join(self.command)!r}"


_PIDFD_SIGNAL_GROUP = 1 << 2  # PIDFD_SIGNAL_PROCESS_GROUP


class ProcessGroup:
    """A server's process group, which the server leads; not killed by its number alone.

    When the last process of a group is gone, another group may get its number. A pidfd of the
    leader keeps referring to the one group, even after the leader has been reaped.
    """

    def __init__(self, leader: int) -> None:
        """Take hold of a group.

        Raises:
            ProcessLookupError: The leader has been reaped already.
        """
        self._leader = leader
        self._pidfd = os.pidfd_open(leader)

    def kill(self) -> None:
        """Kill every process of the group that is left."""
        try:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL, None, _PIDFD_SIGNAL_GROUP)
        except ProcessLookupError:
            pass  # nobody is left
        except OSError:  # the kernel is older than Linux 6.9 and does not know the flag
            self._kill_by_number()

    def _kill_by_number(self) -> None:
        """Only while the leader lives, so that the number cannot belong to another group."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, 0)
            os.killpg(self._leader, signal.SIGKILL)

    def close(self) -> None:
        """Give the descriptor back."""
        os.close(self._pidfd)


class McpConnection:
    """One connection, whose methods block. Any number of threads may use it.

    One task of the event loop holds it open: `close` ends that task, and so does whatever breaks
    the transport.
    """

    def __init__(self, server: McpServer, loop: BackgroundLoop) -> None:
        self.num_users = 0
        """Number of sessions that use the connection; counted by its owner."""
        self._server = server
        self._client: Client | None = None
        self._group: ProcessGroup | None = None
        self._background = loop
        self._closing = threading.Lock()
        self._exit = contextlib.ExitStack()
        self._stop = asyncio.Event()

    def start(self) -> None:
        """Start the server or connect to it.

        Raises:
            McpError: It did not work, or not in time.
        """
        stderr = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._stderr = self._exit.enter_context(stderr)
        self._loop = self._exit.enter_context(self._background)
        started: concurrent.futures.Future[Client] = concurrent.futures.Future()
        self._held = asyncio.run_coroutine_threadsafe(self._hold(started), self._loop)
        self._exit.callback(self._end)
        patience_s = self._server.start_timeout_s + _CLOSE_TIMEOUT_S
        either: list[concurrent.futures.Future[Any]] = [started, self._held]
        concurrent.futures.wait(either, patience_s, "FIRST_COMPLETED")
        if started.done():
            self._client = started.result()
            return
        reason = self._reason()
        self.close()
        raise McpError(f"{self._server} did not start: {reason}")

    @property
    def is_open(self) -> bool:
        """Whether calls may be sent: nobody has closed it, and nothing has broken it."""
        return self._client is not None and not self._held.done()

    def list_tools(self) -> list[Tool]:
        """All tools of the server.

        Raises:
            McpError: The server did not list them in time.
        """

        async def pages(client: Client) -> list[Tool]:
            tools, cursor = [], None
            while True:
                page = await client.list_tools(cursor=cursor)
                tools += page.tools
                cursor = page.next_cursor
                if cursor is None:
                    return tools

        try:
            return self._ask(pages, self._server.start_timeout_s)
        except MCPError as error:
            raise McpError(f"{self._server} does not list its tools: {error}") from error
        except concurrent.futures.TimeoutError:
            limit = f"{self._server.start_timeout_s:g} s"
            raise McpError(f"{self._server} did not list its tools within {limit}") from None

    def call(self, name: str, arguments: dict[str, Any]) -> tuple[Outcome, str]:
        """Call a tool once; return how the call ended, and the text.

        Raises:
            McpError: The server is gone or breaks the protocol. The connection is then closed.
        """
        limit_s = self._server.call_timeout_s
        try:
            result = self._ask(
                lambda client: client.call_tool(name, arguments, read_timeout_seconds=limit_s),
                limit_s + _MARGIN_S,
            )
        except concurrent.futures.TimeoutError:
            return self._overdue(name)
        except MCPError as error:
            if error.code == REQUEST_TIMEOUT:
                return self._overdue(name)
            if error.code == CONNECTION_CLOSED:
                reason = self._reason(error)
                self.close()
                raise McpError(
                    f"{self._server} was lost in a call of {name!r}: {reason}"
                ) from error
            return Outcome.TOOL_ERROR, f"[{error}]"
        outcome = Outcome.TOOL_ERROR if result.is_error else Outcome.OK
        return outcome, _as_text(result)

    def close(self) -> None:
        """End the server or disconnect. Closing twice is allowed."""
        self._client = None
        with self._closing:
            self._exit.close()

    def kill(self) -> None:
        """Kill the server's processes, if it was started here; `close` has to follow."""
        group = self._group
        if group is not None:
            with contextlib.suppress(OSError):  # closed meanwhile
                group.kill()

    def _ask(self, question: Callable[[Client], Awaitable[_T]], timeout_s: float) -> _T:
        """Run something with the client in the event loop.

        Raises:
            MCPError: The server answered with an error, or the transport ended.
            concurrent.futures.TimeoutError: There was no answer in time.
            McpError: Anything else: the transport is broken.
        """
        client = self._client

        async def ask() -> _T:
            assert client is not None
            return await question(client)

        if client is None:
            raise McpError(f"the connection to {self._server} is closed")
        future = asyncio.run_coroutine_threadsafe(ask(), self._loop)
        try:
            return future.result(timeout_s)
        except (MCPError, concurrent.futures.TimeoutError):
            future.cancel()
            raise
        except (Exception, concurrent.futures.CancelledError) as error:
            # One of a dozen types, depending on the transport; a new connection fixes them all.
            reason = self._reason(error)
            self.close()
            raise McpError(f"{self._server} was lost: {reason}") from error

    def _overdue(self, name: str) -> tuple[Outcome, str]:
        """End a call that takes too long. A server that only this episode uses is killed.

        Raises:
            McpError: The server is shared and answers nobody any more.
        """
        text = f"the tool did not answer within {self._server.call_timeout_s:g} s and was stopped"
        if not self._server.shared:
            if self._server.command:
                text += "; what it remembered is lost"
            self.kill()
            self.close()
            return Outcome.TOOL_TIMEOUT, f"[{text}]"
        try:
            self._ask(
                lambda client: client.list_tools(cache_mode="refresh"),
                _PROBE_TIMEOUT_S,
            )
        except (MCPError, concurrent.futures.TimeoutError) as error:
            self.kill()
            self.close()
            raise McpError(f"{self._server} hangs since a call of {name!r}") from error
        return Outcome.TOOL_TIMEOUT, f"[{text}]"

    async def _hold(self, started: concurrent.futures.Future[Client]) -> None:
        server = self._server
        async with contextlib.AsyncExitStack() as stack:
            # The deadline covers all of it, and is lifted as soon as there is a connection.
            deadline = await stack.enter_async_context(asyncio.timeout(server.start_timeout_s))
            if server.url:
                # Calls have deadlines of their own; an answer may take long.
                patience = httpx2.Timeout(server.start_timeout_s, read=None)
                http = httpx2.AsyncClient(headers=server.headers, timeout=patience)
                await stack.enter_async_context(http)
                transport = streamable_http_client(server.url, http_client=http)
            else:
                watch = asyncio.create_task(self._take_hold_of_group())
                stack.callback(watch.cancel)
                parameters = StdioServerParameters(
                    command="/bin/sh",
                    args=["-c", _PRINT_PID, "sh", *server.command],
                    env=server.env,
                    cwd=server.cwd,
                    encoding_error_handler="replace",
                )
                transport = tolerant(stdio_client(parameters, errlog=self._stderr))
            client = await stack.enter_async_context(Client(transport))
            deadline.reschedule(None)
            started.set_result(client)
            await self._stop.wait()

    async def _take_hold_of_group(self) -> None:
        """As soon as the server's process id is known, and before anybody can reap it."""
        while (leader := self._first_line()) == "":
            await asyncio.sleep(_LOOK_EVERY_S)
        with contextlib.suppress(ProcessLookupError):
            self._group = ProcessGroup(int(leader))

    def _first_line(self) -> str:
        """The process id; empty until the shell has printed it."""
        # At an offset of our own, since the server goes on writing.
        line, newline, _ = os.pread(self._stderr.fileno(), _PID_CHARS, 0).partition(b"\n")
        return line.decode() if newline else ""

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        done, _ = concurrent.futures.wait([self._held], _CLOSE_TIMEOUT_S)
        if not done:
            self._held.cancel()
        self.kill()  # processes that the server has started and not ended
        group, self._group = self._group, None
        if group is not None:
            group.close()

    def _reason(self, error: BaseException | None = None) -> str:
        """What is known about an end: the error, and what the server wrote to stderr."""
        if self._held.done() and not self._held.cancelled():
            error = self._held.exception() or error
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        if error is None or isinstance(error, TimeoutError):
            words = f"no answer within {self._server.start_timeout_s:g} s"
        else:
            words = str(error) or repr(error)
        size = os.fstat(self._stderr.fileno()).st_size
        start = max(0, size - _STDERR_CHARS)
        stderr = os.pread(self._stderr.fileno(), _STDERR_CHARS, start).decode(errors="replace")
        lines = stderr.splitlines()[1:]  # the first one is the process id
        return "; ".join([words, *(line for line in lines if line.strip())])


def _as_text(result: CallToolResult) -> str:
    blocks = [_block_text(block) for block in result.content]
    if not blocks and result.structured_content is not None:
        blocks = [json.dumps(result.structured_content, ensure_ascii=False)]
    return "\n".join(blocks) or NO_OUTPUT


def _block_text(block: Any) -> str:
    """The text of a text block; the type and name of any other block."""
    if isinstance(block, TextContent):
        return block.text
    resource = getattr(block, "resource", block)
    if text := getattr(resource, "text", ""):
        return text
    name = getattr(resource, "uri", "") or getattr(resource, "mime_type", "")
    return f"[{block.type} {name}]"
