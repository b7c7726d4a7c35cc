"""The tools of any MCP server, over stdio or streamable HTTP, through the official `mcp` package.

What a server answers to a call is a result with an outcome, as for every tool. A server that died,
or never answered, is an `INFRA_ERROR`, and the next call starts it or connects to it again.

A server that is started here runs *outside* the sandbox, with the rights of this process: it is
trusted code, which a model can only call. Its environment is bare and holds none of our secrets.
"""

from __future__ import annotations

import atexit
import json
import os
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from mcp.types import Tool

from tir_alp.tools.arguments import ArgumentCheck
from tir_alp.tools.background_loop import BackgroundLoop
from tir_alp.tools.base import ToolResult, ToolSession
from tir_alp.tools.mcp_connection import McpConnection, McpError, McpServer
from tir_alp.tools.outcome import Outcome
from tir_alp.tools.sandbox.output import cut_middle


def mcp_tools(
    server: McpServer | Mapping[str, Any], only: Sequence[str] | None = None
) -> list[McpTool]:
    """The tools of a server, for one environment: call this once for every environment.

    Unless the server is `shared`, the tools of one call share one connection per episode. A process
    asks each server for its list once.

    Args:
        server: Where the server is.
        only: Names of the tools to take; None takes all of them.

    Raises:
        ValueError: The server has no tool of such a name, or one with a broken schema.
        McpError: The server did not start or answer.
    """
    server = McpServer.model_validate(server)
    listing = _connections().list_tools(server)
    shared = _shared_connection(server)
    names = [tool.name for tool in listing]
    if missing := [name for name in only or () if name not in names]:
        raise ValueError(f"{server} has no tool {missing[0]!r}; it has: {', '.join(names)}")
    taken = [tool for tool in listing if only is None or tool.name in only]
    try:
        return [McpTool(server, shared, tool) for tool in taken]
    except ValueError as error:
        raise ValueError(f"{server}: {error}; name the other tools in `only`") from error


class McpTool:
    """One tool of a server. Make them with `mcp_tools`."""

    def __init__(self, server: McpServer, shared: _SharedConnection, listed: Tool) -> None:
        self.name = listed.name
        self.description = listed.description or ""
        self.parameters: Mapping[str, Any] = listed.input_schema
        self._server = server
        self._shared = shared
        self._check = ArgumentCheck(listed.name, listed.input_schema)

    def open_session(self) -> McpSession:
        """A session that is not connected yet."""
        return McpSession(self._shared)

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
            # What cannot be sent, such as half a surrogate pair, would break the connection.
            sent = json.loads(
                json.dumps(arguments, allow_nan=False, ensure_ascii=False).encode("utf-8")
            )
        except (ValueError, TypeError, RecursionError) as error:
            return str(error)
        return self._check.error(sent)


class McpSession:
    """One episode's use of a connection, which is opened by the first call."""

    def __init__(self, shared: _SharedConnection) -> None:
        self._shared: _SharedConnection | None = shared
        self._connection: McpConnection | None = None

    def connection(self) -> McpConnection:
        """The live connection; opened if there is none.

        Raises:
            McpError: The server does not start, or cannot be reached.
        """
        if self._shared is None:
            raise McpError("the session is closed")
        if self._connection is not None and not self._connection.is_open:
            connection, self._connection = self._connection, None
            self._shared.release(connection)
        if self._connection is None:
            self._connection = self._shared.acquire()
        return self._connection

    def close(self) -> None:
        """Give the connection back; the last session ends it. Closing twice is allowed."""
        connection, self._connection = self._connection, None
        shared, self._shared = self._shared, None
        if shared is not None and connection is not None:
            shared.release(connection)


class _SharedConnection:
    """A connection that several sessions use: the first one opens it, the last one closes it."""

    def __init__(self, server: McpServer) -> None:
        self._server = server
        self._lock = threading.Lock()
        self._connection: McpConnection | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of a tool opens connections of its own, where it is."""
        return _shared_connection, (self._server,)

    def acquire(self) -> McpConnection:
        with self._lock:
            if self._connection is None or not self._connection.is_open:
                self._connection = _connections().open(self._server)
            self._connection.num_users += 1
            return self._connection

    def release(self, connection: McpConnection) -> None:
        with self._lock:
            connection.num_users -= 1
            if connection.num_users:
                return
            if self._connection is connection:
                self._connection = None
        connection.close()


def _shared_connection(server: McpServer) -> _SharedConnection:
    """That of the process, or one for the tools of one environment."""
    return _connections().shared(server) if server.shared else _SharedConnection(server)


class _Listing:
    """The tools of one server, listed once; other servers do not wait for it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.tools: list[Tool] | None = None


class _Connections:
    """All connections of one process, their event loop, and what is known about the servers."""

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._loop = BackgroundLoop("mcp")
        self._lock = threading.Lock()
        self._listings: dict[str, _Listing] = {}
        self._shared: dict[str, _SharedConnection] = {}
        self._open: weakref.WeakSet[McpConnection] = weakref.WeakSet()
        atexit.register(self._kill_all)

    def open(self, server: McpServer) -> McpConnection:
        """Start a server or connect to it.

        Raises:
            McpError: It did not work, or not in time.
        """
        connection = McpConnection(server, self._loop)
        with self._lock:
            self._open.add(connection)
        connection.start()
        return connection

    def list_tools(self, server: McpServer) -> list[Tool]:
        """The tools of a server, which is asked once.

        Raises:
            McpError: The server did not start or answer.
        """
        with self._lock:
            listing = self._listings.setdefault(server.identity, _Listing())
        with listing.lock:
            if listing.tools is None:
                connection = self.open(server)
                try:
                    listing.tools = connection.list_tools()
                finally:
                    connection.close()
            return listing.tools

    def shared(self, server: McpServer) -> _SharedConnection:
        """The one connection of the process for these settings."""
        with self._lock:
            return self._shared.setdefault(server.model_dump_json(), _SharedConnection(server))

    def _kill_all(self) -> None:
        """At the end of the process; a forked child has inherited the call, not the servers."""
        if os.getpid() == self._owner:
            for connection in list(self._open):
                connection.kill()


_by_process: dict[int, _Connections] = {}


def _connections() -> _Connections:
    """Those of this process: a forked child has no thread that would serve its parent's."""
    pid = os.getpid()
    if pid not in _by_process:
        _by_process.setdefault(pid, _Connections())
    return _by_process[pid]
