"""The sandbox as an HTTP service: sessions, single programs, and the routes of older clients.

    POST   /v1/sessions                 {}                  -> {"session": ID}
    POST   /v1/sessions/ID/run          {"code", "limits"?} -> a `RunResult`
    POST   /v1/sessions/ID/fork         {}                  -> {"session": ID}
    DELETE /v1/sessions/ID
    POST   /v1/sessions/ID/script       as /v1/run, with "code" and "stdin" in base64
    POST   /v1/run                      {"code", "stdin"?, "limits"?} -> with "exit_status"
    GET    /v1/health, /metrics
    POST   /run_code, /run_jupyter, /faas/sandbox/              see `compat.py`

Whatever a program does is a result, with status 200. A 429 or 503 means that nothing ran, and
states when to try again; a 404 means that the session is gone; a 401, that the token is wrong.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hmac
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from aiohttp import web
from aiohttp.typedefs import Handler
from pydantic import Base64Bytes, BaseModel, ConfigDict, ValidationError

from tir_alp.tools.outcome import Outcome
from tir_alp.tools.sandbox.base import Sandbox, Session
from tir_alp.tools.sandbox.config import Limits
from tir_alp.tools.sandbox.result import RunResult, SandboxError
from tir_alp.tools.sandbox.script import Script, ScriptResult
from tir_alp.tools.sandbox.service import compat
from tir_alp.tools.sandbox.service.files import Fetched, fetch_files, put_files
from tir_alp.tools.sandbox.service.metrics import ServiceMetrics
from tir_alp.tools.sandbox.service.notebook import Shown, prepare, saved_images, shown_by_cell

_log = logging.getLogger(__name__)
_SHUTDOWN_S = 10.0
"""Seconds that running calls get to end when the service stops."""
_MAX_FAULTS = 20
"""Number of faults of a bad request that the reply names."""
_Model = TypeVar("_Model", bound=BaseModel)


class ServiceConfig(BaseModel):
    """How much the service lets its clients do."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    token: str | None
    """Token that clients send as `Authorization: Bearer TOKEN`; None lets everybody in."""
    max_waiting: int = 256
    """Number of requests that may wait for a session; further ones are turned away with a 429."""
    max_wait_s: float = 30.0
    """Seconds that a request waits before it is turned away with a 503."""
    max_wall_s: float = 120.0
    """Greatest `wall_s` that a call may request."""
    max_body_bytes: int = 4 << 20
    session_ttl_s: float = 1800.0
    """A session that nobody has called for this long is closed: its client is gone."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Cell(_Strict):
    code: str
    limits: Limits | None = None


class _Script(_Cell):
    stdin: str = ""


class _EncodedScript(_Strict):
    code: Base64Bytes
    stdin: Base64Bytes
    limits: Limits | None = None


@dataclass(slots=True)
class _Lease:
    """A client's session."""

    session: Session
    last_use: float = field(default_factory=time.monotonic)
    num_calls: int = 0
    """Number of calls that are running now."""


class Service:
    """Serves one sandbox. aiohttp runs its `application`."""

    def __init__(self, sandbox: Sandbox, config: ServiceConfig) -> None:
        self._sandbox = sandbox
        self._config = config
        self._leases: dict[str, _Lease] = {}
        self._num_waiting = 0
        self._metrics = ServiceMetrics(lambda: len(self._leases), lambda: self._num_waiting)

    def application(self) -> web.Application:
        """The aiohttp application with all routes."""
        app = web.Application(
            middlewares=[self._authorise, _report_bad_requests],
            client_max_size=self._config.max_body_bytes,
        )
        app.add_routes(
            [
                web.get("/v1/health", self._health),
                web.get("/metrics", self._show_metrics),
                web.post("/v1/sessions", self._open),
                web.post("/v1/sessions/{id}/run", self._run_cell),
                web.post("/v1/sessions/{id}/script", self._run_script_in_session),
                web.post("/v1/sessions/{id}/fork", self._fork),
                web.delete("/v1/sessions/{id}", self._close),
                web.post("/v1/run", self._run_script),
                web.post("/run_code", self._fusion),
                web.post("/faas/sandbox/run_code", self._fusion),
                web.post("/run_jupyter", self._fusion_notebook),
                web.post("/faas/sandbox", self._faas),
                web.post("/faas/sandbox/", self._faas),
            ]
        )
        app.cleanup_ctx.append(self._close_forgotten_sessions)
        return app

    # ------------------------------------------------------------------ sessions and programs

    async def _health(self, request: web.Request) -> web.Response:
        report = dataclasses.asdict(self._sandbox.report)
        return web.json_response({**report, "sessions": len(self._leases)})

    async def _show_metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=self._metrics.text(), content_type="text/plain")

    async def _open(self, request: web.Request) -> web.Response:
        return self._lease(await self._admitted(self._sandbox.open_session()))

    async def _fork(self, request: web.Request) -> web.Response:
        with self._in_use(request) as lease:
            return self._lease(await self._admitted(lease.session.fork()))

    async def _run_cell(self, request: web.Request) -> web.Response:
        cell = await _body(request, _Cell)
        self._check_wall(cell.limits.wall_s if cell.limits else 0.0)
        with self._in_use(request) as lease:
            result = await lease.session.run(cell.code, cell.limits)
        self._metrics.count_call(result)
        return web.json_response(dataclasses.asdict(result))

    async def _run_script_in_session(self, request: web.Request) -> web.Response:
        asked = await _body(request, _EncodedScript)
        self._check_wall(asked.limits.wall_s if asked.limits else 0.0)
        script = Script(code=asked.code, stdin=asked.stdin)
        with self._in_use(request) as lease:
            ended = await lease.session.run_script(script, asked.limits)
        self._metrics.count_call(ended.result)
        return web.json_response(_script_reply(ended))

    async def _close(self, request: web.Request) -> web.Response:
        lease = self._leases.pop(request.match_info["id"], None)
        if lease is not None:
            await lease.session.close()
        return web.json_response({})

    async def _run_script(self, request: web.Request) -> web.Response:
        script = await _body(request, _Script)
        ended = await self._run_program(script.code, script.stdin, script.limits)
        return web.json_response(_script_reply(ended))

    # ------------------------------------------------------------------ older clients

    async def _fusion(self, request: web.Request) -> web.Response:
        asked = await _body(request, compat.FusionRequest)
        limits = Limits(wall_s=asked.run_timeout)
        self._check_wall(limits.wall_s)
        async with await self._admitted(self._sandbox.open_session()) as session:
            try:
                folder = await _put(session, asked)
                ended = await session.run_script(_script(asked.code, asked.stdin), limits)
                self._metrics.count_call(ended.result)
                fetched = await self._fetch(session, folder, asked, [ended.result])
            except SandboxError as error:
                return web.json_response(compat.fusion_failure(str(error)))
        return web.json_response(compat.fusion_reply(ended, fetched))

    async def _fusion_notebook(self, request: web.Request) -> web.Response:
        asked = await _body(request, compat.FusionNotebook)
        self._check_wall(asked.total_timeout)
        async with await self._admitted(self._sandbox.open_session()) as session:
            try:
                return web.json_response(await self._notebook(session, asked))
            except SandboxError as error:
                return web.json_response(compat.notebook_failure(str(error)))

    async def _notebook(self, session: Session, asked: compat.FusionNotebook) -> dict[str, Any]:
        """Run the cells until one is stopped; return the reply."""
        folder = await put_files(session, asked.contents)
        await prepare(session)
        results: list[RunResult] = []
        displays: list[list[dict[str, Any]]] = []
        shown = Shown(self._config.max_body_bytes)
        deadline = time.monotonic() + asked.total_timeout
        for number, code in enumerate(asked.cells, 1):
            left_s = max(0.001, deadline - time.monotonic())
            wall_s = min(left_s, asked.cell_timeout or left_s)
            results.append(await session.run(code, Limits(wall_s=wall_s)))
            self._metrics.count_call(results[-1])
            was_stopped = results[-1].outcome not in (Outcome.OK, Outcome.TOOL_ERROR)
            displays.append([] if was_stopped else await shown_by_cell(session, number, shown))
            if was_stopped:
                break
        fetched = await self._fetch(session, folder, asked, results)
        if results and not results[-1].outcome.is_infrastructure:
            saved = await saved_images(session, asked.contents)
            room = self._config.max_body_bytes - sum(map(len, fetched.files.values()))
            images = await fetch_files(session, folder, saved, room)
            problems = (fetched.problem, images.problem, shown.problem)
            files = {**shown.images, **images.files, **fetched.files}
            fetched = Fetched(files, "; ".join(each for each in problems if each))
        return compat.notebook_reply(results, displays, fetched)

    async def _fetch(
        self, session: Session, folder: str, asked: compat.Files, results: Sequence[RunResult]
    ) -> Fetched:
        failed = any(result.outcome.is_infrastructure for result in results)
        if failed or not asked.fetch_files:
            return Fetched()
        return await fetch_files(session, folder, asked.fetch_files, self._config.max_body_bytes)

    async def _faas(self, request: web.Request) -> web.Response:
        asked = await _body(request, compat.FaasRequest)
        limits = Limits(wall_s=asked.run_timeout)
        ended = await self._run_program(asked.code, asked.stdin or "", limits)
        if ended.result.outcome.is_infrastructure:
            raise self._refusal(503, ended.result.stderr)
        return web.json_response(compat.faas_reply(ended))

    # ------------------------------------------------------------------ admission

    async def _run_program(self, code: str, stdin: str, limits: Limits | None) -> ScriptResult:
        self._check_wall(limits.wall_s if limits else 0.0)
        async with await self._admitted(self._sandbox.open_session()) as session:
            ended = await session.run_script(_script(code, stdin), limits)
        self._metrics.count_call(ended.result)
        return ended

    async def _admitted(self, opening: Coroutine[Any, Any, Session]) -> Session:
        """Wait for a session, unless that takes too long or too many requests wait already."""
        if self._num_waiting >= self._config.max_waiting:
            opening.close()
            raise self._refusal(429, f"{self._num_waiting} requests are waiting already")
        self._num_waiting += 1
        try:
            # Not `wait_for`: cancelled at the wrong moment, it would lose a session that is open.
            async with asyncio.timeout(self._config.max_wait_s):
                return await opening
        except TimeoutError:
            wait_s = self._config.max_wait_s
            raise self._refusal(503, f"no session became free within {wait_s:g} s") from None
        except SandboxError as error:
            raise self._refusal(503, str(error)) from error
        finally:
            self._num_waiting -= 1

    def _refusal(self, status: int, reason: str) -> web.HTTPException:
        self._metrics.count_refusal(status)
        kind = web.HTTPTooManyRequests if status == 429 else web.HTTPServiceUnavailable
        return kind(text=reason, headers={"Retry-After": "1"})

    def _check_wall(self, wall_s: float) -> None:
        if wall_s > self._config.max_wall_s:
            raise web.HTTPBadRequest(
                text=f"the time limit is {wall_s:g} s, and at most {self._config.max_wall_s:g} s"
            )

    # ------------------------------------------------------------------ sessions of clients

    def _lease(self, session: Session) -> web.Response:
        name = secrets.token_urlsafe(16)
        self._leases[name] = _Lease(session)
        return web.json_response({"session": name})

    @contextlib.contextmanager
    def _in_use(self, request: web.Request) -> Iterator[_Lease]:
        lease = self._leases.get(request.match_info["id"])
        if lease is None:
            text = "no such session: it was closed, or expired, or never existed"
            raise web.HTTPNotFound(text=text)
        lease.num_calls += 1
        try:
            yield lease
        finally:
            lease.num_calls -= 1
            lease.last_use = time.monotonic()

    async def _close_forgotten_sessions(self, app: web.Application) -> AsyncIterator[None]:
        """Runs while the application runs; at its end no session is left."""
        sweeper = asyncio.create_task(self._sweep())
        yield
        sweeper.cancel()
        await asyncio.gather(*map(self._end, list(self._leases)))

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(self._config.session_ttl_s / 4)
            oldest = time.monotonic() - self._config.session_ttl_s
            for name, lease in list(self._leases.items()):
                if lease.num_calls == 0 and lease.last_use < oldest:
                    await self._end(name)

    async def _end(self, name: str) -> None:
        """Close a session. A failure is logged and counted, and the other sessions are served."""
        lease = self._leases.pop(name, None)
        if lease is None:
            return
        try:
            await lease.session.close()
        except Exception:
            self._metrics.count_failed_close()
            _log.exception("a session could not be closed")

    # ------------------------------------------------------------------ middleware

    @web.middleware
    async def _authorise(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if self._config.token is not None:
            sent = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
            if not hmac.compare_digest(sent, f"Bearer {self._config.token}".encode()):
                raise web.HTTPUnauthorized(text="send the token: Authorization: Bearer TOKEN")
        return await handler(request)


@web.middleware
async def _report_bad_requests(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False, include_input=False)
        first = errors[:_MAX_FAULTS]
        faults = [(".".join(map(str, each["loc"]))[:200], each["msg"]) for each in first]
        text = "; ".join(f"{path}: {fault}" if path else fault for path, fault in faults)
        return web.Response(status=400, text=text)


def _script(code: str, stdin: str | None) -> Script:
    # JSON can hold lone surrogates.
    return Script(
        code=code.encode("utf-8", "surrogatepass"),
        stdin=(stdin or "").encode("utf-8", "surrogatepass"),
    )


def _script_reply(ended: ScriptResult) -> dict[str, Any]:
    return {**dataclasses.asdict(ended.result), "exit_status": ended.exit_status}


async def _put(session: Session, asked: compat.Files) -> str:
    """Write the request's files; return the working folder, or "" if no file moves."""
    return await put_files(session, asked.contents) if asked.moves_files else ""


async def _body(request: web.Request, model: type[_Model]) -> _Model:
    return model.model_validate_json(await request.read())


async def serve(
    app: web.Application,
    host: str,
    port: int,
    stop: asyncio.Event,
    announce: Callable[[str], None],
) -> None:
    """Serve until `stop` is set. A client that disconnects cancels its call.

    Args:
        app: The application to serve.
        host: Address to listen on.
        port: Port to listen on; 0 takes any free one.
        stop: Ends the service when it is set.
        announce: Called with the address as soon as clients can connect.

    Raises:
        SandboxError: The address cannot be listened on.
    """
    runner = web.AppRunner(
        app, handler_cancellation=True, access_log=None, shutdown_timeout=_SHUTDOWN_S
    )
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            raise SandboxError(f"cannot listen on {host}:{port}: {error}") from error
        announce(f"http://{host}:{runner.addresses[0][1]}")
        await stop.wait()
    finally:
        await runner.cleanup()
