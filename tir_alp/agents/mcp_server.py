"""The sandboxed Python as an MCP server over streamable HTTP, by the `mcp` package's own server.

Each request stands alone: which interpreter it means is said by the episode in its path, so that
any number of connections of an agent share the episode's variables.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from aiohttp import web
from mcp.server.context import ServerRequestContext
from mcp.server.lowlevel import Server
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from mcp.types import (
    CallToolRequestParams,
    CallToolResult,
    ListToolsResult,
    PaginatedRequestParams,
    TextContent,
    Tool,
)

from tir_alp.agents.episode_python import EpisodePython, TooManyCalls
from tir_alp.tools.outcome import Outcome

_PYTHON = "tir_alp.python"  # where the scope of a request has the episode's interpreter

Context = ServerRequestContext[Any, Any]


class McpFront:
    """Answers the MCP requests of all episodes."""

    def __init__(self, max_body_bytes: int) -> None:
        server = Server("tir_alp", on_list_tools=_list_tools, on_call_tool=_call_tool)
        self._manager = StreamableHTTPSessionManager(
            server, json_response=True, stateless=True, max_request_body_size=max_body_bytes
        )
        self._stop = asyncio.Event()
        self._ready = asyncio.Event()
        self._held: asyncio.Task[None] | None = None

    async def answer(
        self, request: web.Request, body: bytes, python: EpisodePython
    ) -> web.StreamResponse:
        """Answer a request, whose key has been checked."""
        if self._held is None:
            self._held = asyncio.create_task(self._hold())
        await self._ready.wait()
        if request.method != "POST":  # streams and ends of sessions, of which there are none
            return web.Response(status=405, headers={"Allow": "POST"})
        exchange = _Exchange(request, body)
        scope = _scope(request) | {_PYTHON: python}
        await self._manager.handle_request(scope, exchange.receive, exchange.send)
        return exchange.response()

    async def close(self) -> None:
        """End what runs."""
        self._stop.set()
        if self._held is not None:
            await self._held

    async def _hold(self) -> None:
        # In one task, since a task group has to be left where it was entered.
        async with self._manager.run():
            self._ready.set()
            await self._stop.wait()


class _Exchange:
    """One request and its response, as ASGI sees them."""

    def __init__(self, request: web.Request, body: bytes) -> None:
        self._request, self._body = request, body
        self._is_read = False
        self._status, self._headers = 500, []
        self._sent: list[bytes] = []

    async def receive(self) -> dict[str, Any]:
        if not self._is_read:
            self._is_read = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await asyncio.Event().wait()  # until the request is answered or cancelled
        raise AssertionError

    async def send(self, message: Mapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self._status, self._headers = message["status"], message["headers"]
        else:
            self._sent.append(message.get("body", b""))

    def response(self) -> web.Response:
        headers = [
            (name.decode("latin-1"), value.decode("latin-1")) for name, value in self._headers
        ]
        kept = [each for each in headers if each[0].lower() != "content-length"]
        return web.Response(status=self._status, headers=kept, body=b"".join(self._sent))


def _scope(request: web.Request) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": request.method,
        "scheme": "http",
        "path": request.path,
        "raw_path": request.path.encode(),
        "root_path": "",
        "query_string": request.query_string.encode(),
        "headers": [(name.lower(), value) for name, value in request.raw_headers],
        "client": None,
        "server": None,
    }


def _python(context: Context) -> EpisodePython:
    request: Any = context.request  # Starlette's; over HTTP there always is one
    return request.scope[_PYTHON]


async def _list_tools(context: Context, _: PaginatedRequestParams | None) -> ListToolsResult:
    python = _python(context)
    tool = Tool(name=python.name, description=python.description, input_schema=python.parameters)
    return ListToolsResult(tools=[tool])


async def _call_tool(context: Context, params: CallToolRequestParams) -> CallToolResult:
    python = _python(context)
    if params.name != python.name:
        return _result(f"there is no tool {params.name!r:.60}; there is {python.name!r}", True)
    try:
        found = await python.run(params.arguments or {})
    except TooManyCalls as error:
        return _result(str(error), True)
    return _result(found.text, found.outcome is not Outcome.OK)


def _result(text: str, is_error: bool) -> CallToolResult:
    return CallToolResult(content=[TextContent(type="text", text=text)], is_error=is_error)
