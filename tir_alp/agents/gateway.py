"""The HTTP side: one server for all episodes, with a base URL and a key for each.

It listens on the loopback interface. A request finds its session by the episode in its path, and
has to carry that episode's key. Whatever one client does (it goes away, floods, sends nonsense)
ends with its own request.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from aiohttp import web

from tir_alp.agents import (
    anthropic_messages,
    openai_chat,
    openai_completions,
    openai_responses,
)
from tir_alp.agents.dialogue_encoder import DialogueEncoder
from tir_alp.agents.episode_python import EpisodePython, TooManyCalls, read_arguments
from tir_alp.agents.session import Answer, ApiError, Request, Session
from tir_alp.agents.wire import read_body
from tir_alp.process import missing_extra
from tir_alp.tools.base import Tool, refused_call
from tir_alp.tools.python_tool import PythonTool

T = TypeVar("T")

MAX_BODY_BYTES = 16 << 20
"""Limit of a request's body."""

_CLOSING_S = 5.0  # time that connections get to end when the gateway closes
_TOOL_THREADS = 64  # calls of the sandboxed Python at the same time, of all episodes
_LARGE = 1 << 18  # bytes of a body that is parsed in a thread, so that others need not wait
_MOST_LARGE = 4  # bodies above that size that an episode has in memory at the same time


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the agent of one episode finds its model."""

    url: str
    """Base URL without the version, as Anthropic's clients want it."""
    key: str
    session: Session
    python: EpisodePython
    """The sandboxed Python of the episode."""
    large: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_MOST_LARGE))
    """Held while a large body is read."""

    @property
    def openai_url(self) -> str:
        """Base URL as OpenAI's clients want it."""
        return f"{self.url}/v1"

    def environment(self) -> dict[str, str]:
        """Return the environment variables by which clients find it."""
        return {
            "OPENAI_BASE_URL": self.openai_url,
            "OPENAI_API_BASE": self.openai_url,
            "OPENAI_API_KEY": self.key,
            "ANTHROPIC_BASE_URL": self.url,
            "ANTHROPIC_API_KEY": self.key,
            "TIR_ALP_MCP_URL": f"{self.url}/mcp",
        }


@dataclass(frozen=True, slots=True)
class Api:
    """One kind of request."""

    read: Callable[[Mapping[str, Any]], Any]
    """Reads the JSON of a request; what it returns has `asked` and `stream`."""
    write: Callable[[Any, Sequence[Answer], str, int, Callable[[int], str]], str]
    events: Callable[[Any, Sequence[Answer], str, int, Callable[[int], str]], Iterator[bytes]]
    prefix: str
    """Beginning of the ids of its responses."""


APIS: dict[str, Api] = {
    "chat/completions": Api(
        openai_chat.read_chat, openai_chat.write_chat, openai_chat.chat_events, "chatcmpl-"
    ),
    "completions": Api(
        openai_completions.read_completion_request,
        openai_completions.write_completion,
        openai_completions.completion_events,
        "cmpl-",
    ),
    "responses": Api(
        openai_responses.read_responses_request,
        openai_responses.write_response,
        openai_responses.response_events,
        "resp_",
    ),
    "messages": Api(
        anthropic_messages.read_messages_request,
        anthropic_messages.write_message,
        anthropic_messages.message_events,
        "msg_",
    ),
}
"""Path below /v1 -> how requests to it are answered."""

_ERRORS: dict[str, Callable[[ApiError], dict[str, Any]]] = {
    "messages": anthropic_messages.error_body,
}
"""Path below /v1 -> how its errors are written; OpenAI's form for all others."""


class Gateway:
    """Serves sessions over HTTP.

    Args:
        encoder: Decodes tokens for those who ask for logprobs.
        model: Name of the model.
        host: Interface to listen on.
        port: Port; 0: any.
        max_body_bytes: Limit of a request's body.
        python: The Python tool that agents are offered; None: with its defaults.
        open_key: A key with which a request may name an episode that is not there yet; empty:
            there are only those that were opened.
        open_episode: Opens a session for a name.
    """

    def __init__(
        self,
        encoder: DialogueEncoder,
        model: str = "policy",
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        max_body_bytes: int = MAX_BODY_BYTES,
        python: Tool | None = None,
        open_key: str = "",
        open_episode: Callable[[str], Endpoint] | None = None,
    ) -> None:
        self._open_key, self._open_episode = open_key, open_episode
        self.encoder, self._model, self._host, self._port = encoder, model, host, port
        self._python, self._max_body_bytes = python or PythonTool(), max_body_bytes
        self._threads = ThreadPoolExecutor(_TOOL_THREADS, thread_name_prefix="agent tool")
        self._mcp: Any = None  # an McpFront, made by the first request
        self._starting: asyncio.Task[None] | None = None
        self._endpoints: dict[str, Endpoint] = {}
        app = web.Application(client_max_size=max_body_bytes)
        app.router.add_get("/{episode}/v1/models", self._models)
        app.router.add_get("/{episode}/v1/models/{model:.+}", self._models)
        app.router.add_route("*", "/{episode}/mcp", self._answer_mcp)
        app.router.add_get("/{episode}/v1/tools", self._tools)
        app.router.add_post("/{episode}/v1/tools/{tool}", self._call)
        app.router.add_post("/{episode}/v1/{api:.+}", self._answer)
        app.router.add_route("*", "/{rest:.*}", self._unknown)
        self._runner = web.AppRunner(
            app, handler_cancellation=True, access_log=None, shutdown_timeout=_CLOSING_S
        )

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://{self._host}:{self._port}"

    async def start(self) -> None:
        """Begin to listen, if it does not yet."""
        if self._starting is None:
            self._starting = asyncio.create_task(self._start())
        await asyncio.shield(self._starting)

    async def _start(self) -> None:
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._host, self._port)
        await site.start()
        self._port = self._runner.addresses[0][1]

    async def close(self) -> None:
        """End all sessions, and stop."""
        for each in [*self._endpoints.values()]:
            await self.end(each)
        if self._mcp is not None:
            await self._mcp.close()
        await self._runner.cleanup()
        self._threads.shutdown(wait=False)

    def open(
        self, session: Session, *, name: str | None = None, key: str | None = None
    ) -> Endpoint:
        """Give a session its URL and key.

        Args:
            session: The session.
            name: Its part of the URL; None: a random one.
            key: Its key; None: a random one.
        """
        name = name or secrets.token_hex(8)
        python = EpisodePython(self._python, self._threads, session.failures.append)
        key = key or f"sk-{secrets.token_hex(16)}"
        endpoint = Endpoint(f"{self.url}/{name}", key, session, python)
        self._endpoints[name] = endpoint
        return endpoint

    async def end(self, endpoint: Endpoint) -> None:
        """End a session: its key is no longer valid, and what runs for it is cancelled."""
        self._endpoints = {
            name: each for name, each in self._endpoints.items() if each is not endpoint
        }
        await endpoint.session.close()
        await endpoint.python.close()

    def _endpoint(self, request: web.Request) -> Endpoint:
        given = request.headers.get("x-api-key", "")
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            given = token.strip()
        name = request.match_info["episode"]
        endpoint = self._endpoints.get(name)
        if endpoint is None and self._open_episode is not None and _same(given, self._open_key):
            endpoint = self._open_episode(name)
        if endpoint is None or not _same(given, endpoint.key):
            raise ApiError(
                401,
                "the key is not that of this URL's episode, or the episode has ended",
                code="invalid_api_key",
            )
        return endpoint

    async def _models(self, request: web.Request) -> web.StreamResponse:
        try:
            self._endpoint(request)
        except ApiError as error:
            return _refusal(error, "models")
        model = {"id": self._model, "object": "model", "created": 0, "owned_by": "tir_alp"}
        if "model" in request.match_info:
            return web.json_response(model | {"id": request.match_info["model"]})
        return web.json_response({"object": "list", "data": [model]})

    async def _tools(self, request: web.Request) -> web.StreamResponse:
        try:
            python = self._endpoint(request).python
        except ApiError as error:
            return _refusal(error, "tools")
        return web.json_response({"object": "list", "data": [python.schema()]})

    async def _call(self, request: web.Request) -> web.StreamResponse:
        """Make the call that a model wrote: the body is its arguments."""
        try:
            endpoint = self._endpoint(request)
            python, name = endpoint.python, request.match_info["tool"]
            if name != python.name:
                raise ApiError(404, f"there is no tool {name!r}; there is {python.name!r}")
            arguments = await _read(request, endpoint, read_arguments)
            if isinstance(arguments, str):
                result = refused_call(arguments)
            else:
                result = await python.run(arguments)
        except TooManyCalls as error:
            return _refusal(ApiError(429, str(error)), "tools")
        except ApiError as error:
            return _refusal(error, "tools")
        return web.json_response({"content": result.text, "outcome": result.outcome.value})

    async def _answer_mcp(self, request: web.Request) -> web.StreamResponse:
        try:
            endpoint = self._endpoint(request)
            if self._mcp is None:
                self._mcp = _mcp_front(self._max_body_bytes)
            body = await _read(request, endpoint, bytes)
        except ApiError as error:
            return _refusal(error, "mcp")
        return await self._mcp.answer(request, body, endpoint.python)

    async def _unknown(self, request: web.Request) -> web.StreamResponse:
        error = ApiError(404, f"there is no {request.method} {request.path_qs}", code="not_found")
        return _refusal(error, "")

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        path = request.match_info["api"]
        try:
            endpoint = self._endpoint(request)
            api = APIS.get(path)
            if api is None:
                known = ", ".join(f"/v1/{each}" for each in APIS)
                raise ApiError(404, f"there is no /v1/{path}; there are {known}", code="not_found")
            read = api.read
            wish = await _read(request, endpoint, lambda data: read(read_body(data)))
            asked: Request = wish.asked
            answers = await endpoint.session.answer(asked)
        except ApiError as error:
            return _refusal(error, path)
        name, created = f"{api.prefix}{secrets.token_hex(12)}", int(time.time())
        shape = (wish, answers, name, created, self._token_text)
        if not wish.stream:
            return web.Response(text=api.write(*shape), content_type="application/json")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"".join(api.events(*shape)))
        await response.write_eof()
        return response

    def _token_text(self, token_id: int) -> str:
        return self.encoder.tokenizer.decode([token_id], skip_special_tokens=False)


def _mcp_front(max_body_bytes: int) -> Any:
    # Imported here because it needs the extra 'mcp', which other agents do without.
    try:
        from tir_alp.agents.mcp_server import McpFront
    except ImportError as error:
        module = (error.name or "").partition(".")[0]
        raise ApiError(501, f"the MCP server needs {module}, and {missing_extra(module)}") from None
    return McpFront(max_body_bytes)


def _same(given: str, key: str) -> bool:
    return hmac.compare_digest(given.encode(errors="replace"), key.encode())


async def _read(request: web.Request, endpoint: Endpoint, parse: Callable[[bytes], T]) -> T:
    """Parse the body of a request; that of an episode's large ones is in memory for a few only."""
    length = request.content_length
    is_as_said = "Content-Encoding" not in request.headers  # a compressed body can be any length
    if length is not None and length <= _LARGE and is_as_said:
        return parse(await _body(request))
    async with endpoint.large:
        return await asyncio.to_thread(parse, await _body(request))


async def _body(request: web.Request) -> bytes:
    try:
        return await request.read()
    except web.HTTPRequestEntityTooLarge as error:
        raise ApiError(413, f"the body of the request is too large: {error.text}") from error
    except (ConnectionError, asyncio.IncompleteReadError) as error:
        raise ApiError(400, "the body of the request is not complete") from error


def _refusal(error: ApiError, path: str) -> web.Response:
    body = _ERRORS.get(path, openai_chat.error_body)(error)
    return web.Response(status=error.status, text=json.dumps(body), content_type="application/json")
