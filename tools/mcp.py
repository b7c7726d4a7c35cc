"""The tools of any MCP server, over stdio or streamable HTTP, by the official `mcp` package.

What a server says about a call is a result with an outcome, as for every tool. That a server died,
or never answered, is `INFRA_ERROR`, and the next call starts or connects it again.

A server that is started here runs *outside* the sandbox, with the rights of this process: it is
trusted code, which a model can only call. It gets a bare environment, none of our secrets in it.

The protocol is asynchronous, environments are not: all connections live in one event loop, in one
thread. The first connection starts it and the last one ends it.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

import httpx2
from mcp import Client, StdioServerParameters
from mcp.client.stdio import stdio_client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.exceptions import MCPError
from mcp.types import CONNECTION_CLOSED, REQUEST_TIMEOUT, CallToolResult, TextContent, Tool
from pydantic import BaseModel, ConfigDict, Field, model_validator

from tir_alp.tools.arguments import ArgumentCheck
from tir_alp.tools.background_loop import BackgroundLoop
from tir_alp.tools.base import ToolResult, ToolSession
from tir_alp.tools.outcome import Outcome
from tir_alp.tools.python_tool import NO_OUTPUT
from tir_alp.tools.sandbox.output import cut_middle

_T = TypeVar("_T")
_CLOSE_TIMEOUT_S = 15.0
"""A server is asked to end, then told, then killed; that takes the library 7 seconds at most."""
_PROBE_TIMEOUT_S = 5.0
_MARGIN_S = 5.0
"""By how much the loop may be late with a deadline of its own."""
_STDERR_CHARS = 2000

# The shell says its process id, which is also the one of its group, and becomes the server.
_SAY_PID = 'echo "$$" >&2; exec "$@"'


class McpError(Exception):
    """A server could not be started, reached or listed, or is gone. For people."""


class McpServer(BaseModel):
    """Where a server is, and how long it may take.

    Example: `McpServer(command=("mcp-server-time", "--local-timezone", "UTC"))`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    command: tuple[str, ...] = ()
    """Starts a server that speaks over stdin and stdout. Either this or `url`."""
    env: dict[str, str] = Field(default_factory=dict)
    """Its environment, beside HOME, LOGNAME, PATH, SHELL, TERM and USER."""
    cwd: str | None = None
    """Its working directory; None: ours."""
    url: str | None = None
    """A server that speaks streamable HTTP, such as "http://127.0.0.1:8000/mcp"."""
    headers: dict[str, str] = Field(default_factory=dict)
    """Sent with every HTTP request, such as an authorization."""
    shared: bool = False
    """One connection for all environments of this process, which saves a start an episode. Only for
    servers without state; otherwise episodes would see each other's."""
    start_timeout_s: float = Field(default=30.0, gt=0)
    """To start, connect and list the tools."""
    call_timeout_s: float = Field(default=30.0, gt=0)
    """For one call."""
    max_output_chars: int = Field(default=4096, ge=1)
    """How long the text that the model reads may become."""

    @model_validator(mode="after")
    def _check_transport(self) -> McpServer:
        if bool(self.command) == bool(self.url):
            raise ValueError("an MCP server has either a command (stdio) or a url (HTTP)")
        for name, needs in (("env", "command"), ("cwd", "command"), ("headers", "url")):
            if getattr(self, name) and not getattr(self, needs):
                raise ValueError(f"{name} is for an MCP server with a {needs}")
        return self

    @property
    def place(self) -> str:
        """The same for settings that lead to the same tools."""
        return self.model_dump_json(include={"command", "env", "cwd", "url", "headers"})

    def __str__(self) -> str:
        return f"the MCP server {self.url or ' '.join(self.command)!r}"


class McpSession:
    """The part of one episode in a connection; it is made by the first call."""

    def __init__(self, holder: _Holder) -> None:
        self._holder: _Holder | None = holder
        self._connection: McpConnection | None = None

    def connection(self) -> McpConnection:
        """The live connection, opened if there is none.

        Raises:
            McpError: There is no connecting to the server.
        """
        if self._holder is None:
            raise McpError("the session is closed")
        if self._connection is not None and not self._connection.is_open:
            connection, self._connection = self._connection, None
            self._holder.take_back(connection)
        if self._connection is None:
            self._connection = self._holder.lend()
        return self._connection

    def close(self) -> None:
        """Give the connection back; the last session ends it. Closing twice is allowed."""
        connection, self._connection = self._connection, None
        holder, self._holder = self._holder, None
        if holder is not None and connection is not None:
            holder.take_back(connection)


class McpTool:
    """One tool of a server. Make them with `mcp_tools`."""

    def __init__(self, server: McpServer, holder: _Holder, listed: Tool) -> None:
        self.name = listed.name
        self.description = listed.description or ""
        self.parameters: Mapping[str, Any] = listed.input_schema
        self._server = server
        self._holder = holder
        self._check = ArgumentCheck(listed.name, listed.input_schema)

    def open_session(self) -> McpSession:
        """A session that is not connected yet."""
        return McpSession(self._holder)

    def run(self, arguments: Mapping[str, Any], session: ToolSession) -> ToolResult:
        """Call the tool; arguments that its schema refuses are answered without a call."""
        assert isinstance(session, McpSession)
        if complaint := self._complaint(arguments):
            return self._result(Outcome.TOOL_ERROR, f"[bad arguments: {complaint}]", 0.0)
        began = time.monotonic()
        try:
            outcome, text = session.connection().call(self.name, dict(arguments))
        except McpError as error:
            outcome, text = Outcome.INFRA_ERROR, str(error)
        return self._result(outcome, text, time.monotonic() - began)

    def _result(self, outcome: Outcome, text: str, duration_s: float) -> ToolResult:
        shown = "[the tool is not available]" if outcome.is_infrastructure else text
        shown, _ = cut_middle(shown, self._server.max_output_chars)
        error = "" if outcome is Outcome.OK else text
        return ToolResult(outcome=outcome, text=shown, duration_s=duration_s, error=error)

    def _complaint(self, arguments: Mapping[str, Any]) -> str:
        """What is wrong with the arguments; empty if nothing is."""
        try:
            # What cannot be sent would break the connection: halves of surrogate pairs, for one.
            sent = json.loads(
                json.dumps(arguments, allow_nan=False, ensure_ascii=False).encode("utf-8")
            )
        except (ValueError, TypeError, RecursionError) as error:
            return str(error)
        return self._check.error(sent)


def mcp_tools(
    server: McpServer | Mapping[str, Any], only: Sequence[str] | None = None
) -> list[McpTool]:
    """The tools of a server, for one environment: make them anew for every environment.

    Unless the server is `shared`, those of one call have one connection a episode between them.
    The server is asked for its list once in a process.

    Args:
        server: Where it is.
        only: Names of the tools to take; None: all of them.

    Raises:
        ValueError: The server has no tool of such a name, or one with a broken schema.
        McpError: The server did not start or answer.
    """
    server = McpServer.model_validate(server)
    with _lock:
        if server.place not in _listings:
            _listings[server.place] = _list_tools(server)
        listing = _listings[server.place]
        if server.shared:
            holder = _shared.setdefault(server.model_dump_json(), _Holder(server))
        else:
            holder = _Holder(server)
    names = [tool.name for tool in listing]
    if missing := [name for name in only or () if name not in names]:
        raise ValueError(f"{server} has no tool {missing[0]!r}; it has: {', '.join(names)}")
    taken = [tool for tool in listing if only is None or tool.name in only]
    try:
        return [McpTool(server, holder, tool) for tool in taken]
    except ValueError as error:
        raise ValueError(f"{server}: {error}; name the other tools in `only`") from error


class McpConnection:
    """One live connection, whose methods block. Used from any number of threads.

    One task of the event loop holds it open: `close` ends that task, and so does whatever breaks
    the transport.
    """

    def __init__(self, server: McpServer) -> None:
        """Start the server, or connect to it.

        Raises:
            McpError: It did not work, or not in time.
        """
        self.users = 0
        """Sessions that have it; kept by its holder."""
        self._server = server
        self._client: Client | None = None
        self._stderr = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._closing = threading.Lock()
        self._exit = contextlib.ExitStack()
        self._exit.callback(self._stderr.close)
        self._loop = self._exit.enter_context(_loop)
        self._stop = asyncio.Event()
        started: concurrent.futures.Future[Client] = concurrent.futures.Future()
        self._held = asyncio.run_coroutine_threadsafe(self._hold(started), self._loop)
        self._exit.callback(self._end)
        _open.add(self)
        patience_s = server.start_timeout_s + _CLOSE_TIMEOUT_S
        either: list[concurrent.futures.Future[Any]] = [started, self._held]
        concurrent.futures.wait(either, patience_s, "FIRST_COMPLETED")
        if started.done():
            self._client = started.result()
            return
        reason = self._reason()
        self.close()
        raise McpError(f"{server} did not start: {reason}")

    @property
    def is_open(self) -> bool:
        """Whether calls may be sent: nobody closed it, and nothing broke it."""
        return self._client is not None and not self._held.done()

    def list_tools(self) -> list[Tool]:
        """All tools of the server.

        Raises:
            McpError: It did not say so in time.
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
        """Call a tool once: what came of it, and the text.

        Raises:
            McpError: The server is gone, or does not keep to the protocol. The connection is closed
                then.
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
        _open.discard(self)

    def kill(self) -> None:
        """Kill the server's processes, if they are ours; `close` has to follow."""
        with contextlib.suppress(OSError, ValueError):
            # At an offset of our own, since the server goes on writing.
            first_line = os.pread(self._stderr.fileno(), 32, 0).split(b"\n")[0]
            os.killpg(int(first_line), signal.SIGKILL)

    def _ask(self, question: Callable[[Client], Awaitable[_T]], timeout_s: float) -> _T:
        """Run something with the client in the event loop.

        Raises:
            MCPError: The server's answer, or that the transport ended.
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
            # Of a dozen types, by transport; a new connection mends every one of them.
            reason = self._reason(error)
            self.close()
            raise McpError(f"{self._server} was lost: {reason}") from error

    def _overdue(self, name: str) -> tuple[Outcome, str]:
        """End a call that takes too long; what is ours to kill, and only this episode's, is killed.

        Raises:
            McpError: The server, which others use as well, answers nobody any more.
        """
        said = f"the tool did not answer within {self._server.call_timeout_s:g} s and was stopped"
        if not self._server.shared:
            if self._server.command:
                said += "; what it remembered is lost"
            self.kill()
            self.close()
            return Outcome.TOOL_TIMEOUT, f"[{said}]"
        try:
            self._ask(
                lambda client: client.list_tools(cache_mode="refresh"),
                _PROBE_TIMEOUT_S,
            )
        except (MCPError, concurrent.futures.TimeoutError) as error:
            self.kill()
            self.close()
            raise McpError(f"{self._server} hangs since a call of {name!r}") from error
        return Outcome.TOOL_TIMEOUT, f"[{said}]"

    async def _hold(self, started: concurrent.futures.Future[Client]) -> None:
        server = self._server
        async with contextlib.AsyncExitStack() as stack:
            # The deadline is around all of it, and is lifted as soon as there is a connection.
            deadline = await stack.enter_async_context(asyncio.timeout(server.start_timeout_s))
            if server.url:
                # Calls have deadlines of their own; an answer may be long in coming.
                patience = httpx2.Timeout(server.start_timeout_s, read=None)
                http = httpx2.AsyncClient(headers=server.headers, timeout=patience)
                await stack.enter_async_context(http)
                transport = streamable_http_client(server.url, http_client=http)
            else:
                transport = stdio_client(
                    StdioServerParameters(
                        command="/bin/sh",
                        args=["-c", _SAY_PID, "sh", *server.command],
                        env=server.env,
                        cwd=server.cwd,
                        encoding_error_handler="replace",
                    ),
                    errlog=self._stderr,
                )
            client = await stack.enter_async_context(Client(transport))
            deadline.reschedule(None)
            started.set_result(client)
            await self._stop.wait()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        done, _ = concurrent.futures.wait([self._held], _CLOSE_TIMEOUT_S)
        if not done:
            self._held.cancel()
        self.kill()  # what the server started itself, and left behind

    def _reason(self, error: BaseException | None = None) -> str:
        """What is known of an end, in the words of the part that ended."""
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


class _Holder:
    """Who has the connection that several sessions share."""

    def __init__(self, server: McpServer) -> None:
        self._server = server
        self._lock = threading.Lock()
        self._connection: McpConnection | None = None

    def lend(self) -> McpConnection:
        with self._lock:
            if self._connection is None or not self._connection.is_open:
                self._connection = McpConnection(self._server)
            self._connection.users += 1
            return self._connection

    def take_back(self, connection: McpConnection) -> None:
        with self._lock:
            connection.users -= 1
            if connection.users:
                return
            if self._connection is connection:
                self._connection = None
        connection.close()


def _list_tools(server: McpServer) -> list[Tool]:
    connection = McpConnection(server)
    try:
        return connection.list_tools()
    finally:
        connection.close()


def _as_text(result: CallToolResult) -> str:
    parts = [_block_text(block) for block in result.content]
    if not parts and result.structured_content is not None:
        parts = [json.dumps(result.structured_content, ensure_ascii=False)]
    return "\n".join(parts) or NO_OUTPUT


def _block_text(block: Any) -> str:
    """A text as it is; of anything else, what it is."""
    if isinstance(block, TextContent):
        return block.text
    resource = getattr(block, "resource", block)
    if text := getattr(resource, "text", ""):
        return text
    name = getattr(resource, "uri", "") or getattr(resource, "mime_type", "")
    return f"[{block.type} {name}]"


_lock = threading.Lock()
_loop = BackgroundLoop("mcp")
_listings: dict[str, list[Tool]] = {}
_shared: dict[str, _Holder] = {}
_open: set[McpConnection] = set()


def _kill_all() -> None:
    for connection in list(_open):
        connection.kill()


def _forget_all() -> None:
    global _lock, _loop
    _lock, _loop = threading.Lock(), BackgroundLoop("mcp")
    _shared.clear()
    _open.clear()


atexit.register(_kill_all)
os.register_at_fork(after_in_child=_forget_all)  # a forked child has no thread that would serve it
