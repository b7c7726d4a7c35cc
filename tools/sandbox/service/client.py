"""Backend `remote`: sessions in services (`server.py`) on other hosts.

A session stays on the host where it was opened. A request that did not run (no connection, a 429, a
503) is tried again, on another host if necessary, until `max_wait_s` is over. A request that may
have run is not repeated: it is an `INFRA_ERROR`, and the next call begins in a fresh interpreter.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from tir_alp.tools.outcome import Outcome
from tir_alp.tools.sandbox.config import TOKEN_VARIABLE, Limits, SandboxConfig
from tir_alp.tools.sandbox.result import (
    RunResult,
    SandboxError,
    SandboxRefused,
    SandboxReport,
    failed_result,
)
from tir_alp.tools.sandbox.script import EXIT_STATUS, Script, ScriptResult

_CHECK_EVERY_S = 5.0
_REQUEST_TIMEOUT_S = 60.0
_MARGIN_S = 30.0
"""Seconds that a service may take for a call beyond the call's own limits."""
_MIN_PAUSE_S = 0.05


class _NothingRan(Exception):
    """The host did not accept the request; another one may."""


class _SessionGone(Exception):
    """The host no longer knows the session."""


class _ServiceHost:
    """One service, and what is known about it."""

    def __init__(self, url: str, client: aiohttp.ClientSession) -> None:
        self.url = url.rstrip("/")
        self.is_healthy = True
        self.num_sessions = 0
        self._client = client

    async def request(
        self, method: str, path: str, body: dict[str, Any] | None = None, timeout_s: float = 0.0
    ) -> dict[str, Any]:
        """Send one request and return the reply.

        Raises:
            _NothingRan: The request was not accepted.
            _SessionGone: There is no such session.
            SandboxError: The request was refused for good, or its fate is unknown.
        """
        timeout = aiohttp.ClientTimeout(total=timeout_s or _REQUEST_TIMEOUT_S, sock_connect=5.0)
        try:
            async with self._client.request(
                method, self.url + path, json=body, timeout=timeout
            ) as response:
                if response.status in (429, 503):
                    raise _NothingRan(f"{self.url}: {await response.text()}")
                if response.status == 404:
                    raise _SessionGone(f"{self.url} no longer knows the session")
                if response.status != 200:
                    text = await response.text()
                    raise SandboxError(f"{self.url} answered {response.status}: {text[:500]}")
                return await response.json()
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            self.is_healthy = False
            raise _NothingRan(f"{self.url}: {error}") from error
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise SandboxError(f"{self.url}: {type(error).__name__}: {error}") from error


class RemoteSandbox:
    """Opens each session on the host that has the fewest. See `base.Sandbox`."""

    def __init__(self, config: SandboxConfig) -> None:
        self.report = SandboxReport(backend="remote")
        self._config = config
        self._hosts: list[_ServiceHost] = []
        self._client: aiohttp.ClientSession | None = None
        self._checker: asyncio.Task[None] | None = None
        self._closing: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Check the health of every host.

        Raises:
            SandboxRefused: No host answers.
        """
        token = os.environ.get(TOKEN_VARIABLE)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        connector = aiohttp.TCPConnector(limit=0)
        self._client = aiohttp.ClientSession(headers=headers, connector=connector)
        self._hosts = [_ServiceHost(url, self._client) for url in self._config.hosts]
        answers = await asyncio.gather(*map(_health, self._hosts))
        refused = {
            h.url: a for h, a in zip(self._hosts, answers, strict=True) if isinstance(a, str)
        }
        if len(refused) == len(self._hosts):
            listing = "; ".join(refused.values())
            raise SandboxRefused(f"no sandbox service can be used: {listing}")
        reports = [answer for answer in answers if isinstance(answer, dict)]
        warnings = [warning for report in reports for warning in report["warnings"]]
        backends = sorted({report["backend"] for report in reports})
        self.report = SandboxReport(
            backend=f"remote ({', '.join(backends)})",
            refused=refused,
            warnings=tuple(dict.fromkeys(warnings)),
        )
        self._checker = asyncio.create_task(self._check_hosts())

    async def stop(self) -> None:
        """Disconnect from the hosts, which close the sessions that nobody calls any more."""
        if self._checker is not None:
            self._checker.cancel()
        await asyncio.gather(*self._closing)
        if self._client is not None:
            await self._client.close()

    @asynccontextmanager
    async def session(self) -> AsyncIterator[RemoteSession]:
        """As `base.Sandbox.session`."""
        session = await self.open_session()
        try:
            yield session
        finally:
            await session.close()

    async def open_session(self) -> RemoteSession:
        """As `base.Sandbox.open_session`."""
        return RemoteSession(self, self._config, *await self.open_somewhere())

    async def open_somewhere(self) -> tuple[_ServiceHost, str]:
        """Open a session; return its host and its name there.

        Raises:
            SandboxError: No host had a free session in time.
        """
        deadline = time.monotonic() + self._config.max_wait_s
        pause_s, refusal = _MIN_PAUSE_S, "no host is healthy"
        while True:
            for host in sorted(self._hosts, key=lambda h: (not h.is_healthy, h.num_sessions)):
                host.num_sessions += 1  # before the reply, so that simultaneous requests spread out
                try:
                    return host, (await host.request("POST", "/v1/sessions", {}))["session"]
                except (_NothingRan, _SessionGone) as error:
                    host.num_sessions -= 1
                    refusal = str(error)
                except BaseException:
                    host.num_sessions -= 1
                    raise
            if time.monotonic() + pause_s > deadline:
                raise SandboxError(f"no session within {self._config.max_wait_s:g} s: {refusal}")
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, 1.0)

    def close_in_background(self, host: _ServiceHost, name: str) -> None:
        """Close a session without waiting for it."""
        task = asyncio.create_task(_close(host, name))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _check_hosts(self) -> None:
        """Check the hosts' health periodically, until the sandbox ends."""
        while True:
            await asyncio.sleep(_CHECK_EVERY_S)
            await asyncio.gather(*map(_health, self._hosts))


class RemoteSession:
    """A session on one host, or on another one after it was lost. See `base.Session`."""

    def __init__(
        self, sandbox: RemoteSandbox, config: SandboxConfig, host: _ServiceHost, name: str
    ) -> None:
        self._sandbox = sandbox
        self._config = config
        self._remote: tuple[_ServiceHost, str] | None = (host, name)
        """Host and name of the session; None while it has none."""
        self._lock = asyncio.Lock()
        self._has_state = False
        self._lost_state = False
        self._closed = False

    async def run(self, code: str, limits: Limits | None = None) -> RunResult:
        """As `base.Session.run`."""
        reply = await self._run("run", {"code": code}, limits)
        return reply if isinstance(reply, RunResult) else _result(reply)

    async def run_script(self, script: Script, limits: Limits | None = None) -> ScriptResult:
        """As `base.Session.run_script`."""
        code, stdin = (base64.b64encode(data).decode() for data in (script.code, script.stdin))
        reply = await self._run("script", {"code": code, "stdin": stdin}, limits)
        if isinstance(reply, RunResult):
            return ScriptResult(reply, EXIT_STATUS[reply.outcome])
        status = reply.pop("exit_status")
        return ScriptResult(_result(reply), status)

    async def _run(
        self, verb: str, body: dict[str, Any], limits: Limits | None
    ) -> dict[str, Any] | RunResult:
        """The reply to a call, or the result if there is none."""
        started = time.perf_counter()
        async with self._lock:
            try:
                return await self._call(verb, body, limits or self._config.limits)
            except SandboxError as error:
                return failed_result(error, time.perf_counter() - started)
            except BaseException:
                self._leave(state_is_lost=True)
                raise

    async def fork(self) -> RemoteSession:
        """As `base.Session.fork`."""
        async with self._lock:
            if self._remote is None:
                raise SandboxError("nothing left to fork: the host lost the session")
            host, name = self._remote
            try:
                reply = await host.request("POST", f"/v1/sessions/{name}/fork", {})
            except (_NothingRan, _SessionGone) as error:
                raise SandboxError(f"the session cannot be forked: {error}") from error
            host.num_sessions += 1
            branch = RemoteSession(self._sandbox, self._config, host, reply["session"])
            branch._has_state = self._has_state
            return branch

    async def close(self) -> None:
        """As `base.Session.close`."""
        self._closed = True
        if self._remote is not None:
            (host, name), self._remote = self._remote, None
            host.num_sessions -= 1
            await _close(host, name)

    async def __aenter__(self) -> RemoteSession:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def _call(self, verb: str, body: dict[str, Any], limits: Limits) -> dict[str, Any]:
        if self._closed:
            raise SandboxError("the session is closed")
        body = {**body, "limits": limits.model_dump()}
        timeout_s = limits.wall_s + self._config.max_wait_s + _MARGIN_S
        while True:
            if self._remote is None:
                self._remote = await self._sandbox.open_somewhere()
            host, name = self._remote
            try:
                reply = await host.request("POST", f"/v1/sessions/{name}/{verb}", body, timeout_s)
            except (_NothingRan, _SessionGone) as error:
                self._leave(state_is_lost=False)
                if self._has_state:  # the program may rely on variables that are gone
                    self._has_state = False
                    raise SandboxError(f"the variables were lost: {error}") from error
                continue
            except SandboxError:
                self._leave(state_is_lost=True)
                raise
            self._has_state = True
            if self._lost_state:
                self._lost_state = False
                note = "The interpreter was restarted: earlier variables are lost."
                reply["note"] = reply["note"] or note
            return reply

    def _leave(self, state_is_lost: bool) -> None:
        if self._remote is not None:
            (host, name), self._remote = self._remote, None
            host.num_sessions -= 1
            self._sandbox.close_in_background(host, name)
            self._lost_state = self._lost_state or (state_is_lost and self._has_state)
            self._has_state = self._has_state and not state_is_lost


def _result(reply: dict[str, Any]) -> RunResult:
    return RunResult(**{**reply, "outcome": Outcome(reply["outcome"])})


async def _close(host: _ServiceHost, name: str) -> None:
    """Close a session; a host that cannot be reached closes it by itself in time."""
    with contextlib.suppress(SandboxError, _NothingRan, _SessionGone):
        await host.request("DELETE", f"/v1/sessions/{name}", timeout_s=_CHECK_EVERY_S)


async def _health(host: _ServiceHost) -> dict[str, Any] | str:
    """A host's report, or the reason why it cannot be used."""
    try:
        report = await host.request("GET", "/v1/health", timeout_s=_CHECK_EVERY_S)
    except (SandboxError, _NothingRan, _SessionGone) as error:
        host.is_healthy = False
        return str(error)
    host.is_healthy = True
    return report
