"""SGLang's own router in front of the servers: it picks the server of a completion, and no more.

Weights, checks, aborts and health checks go to the servers themselves, since a router knows nothing
of weights. It has the servers that are up, and no others. A completion itself tells which server
sampled it, because each server gives its weights names of its own.

Completions that a router cannot pass on go straight to a server: those with `top_p` below 1, whose
sampling mask it drops from the request, and all of them while the router is lost.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp

from tir_alp.config import SGLangConfig
from tir_alp.engines.base import EngineFailed, Log
from tir_alp.engines.servers.http_client import ServerFailed
from tir_alp.engines.servers.process import ServerProcess, free_port
from tir_alp.engines.servers.sglang_router_main import KEY_VARIABLE as OWN_KEY_VARIABLE
from tir_alp.engines.sglang.client import SGLangClient
from tir_alp.engines.sglang.fleet import KEY_VARIABLE, MOST_STARTS, Fleet
from tir_alp.engines.sglang.request import SGLangRequest

_LOOK_EVERY_S = 5.0
_RETRY_S = 0.2
_ADD_AGAIN_S = 60.0  # it takes a second to add a server that answers


class Router:
    """A router, and which servers it has; `make_router` makes one.

    Args:
        process: The process that the run starts; None: the router runs already.
        connect: Makes a client of the router at an address.
        url: Address of a router that runs already.
        fleet: The servers that it has to have.
        server_key: API key of the servers.
        config: Settings of the engine, for deadlines.
        log: Receives losses and recoveries.
    """

    def __init__(
        self,
        process: RouterProcess | None,
        connect: Callable[[str], SGLangClient],
        url: str,
        fleet: Fleet,
        server_key: str | None,
        config: SGLangConfig,
        log: Log,
    ) -> None:
        self.process, self._connect = process, connect
        self.client = connect(url)
        self._fleet, self._server_key = fleet, server_key
        self._config, self._log = config, log
        self.serves = False
        """Whether it answers and has a server."""
        self._starts = 0
        self._known: set[str] = set()  # addresses that servers of the fleet have or had
        self._found: set[str] | None = None  # those that it had when the run began
        self._requested_at: dict[str, float] = {}  # servers being added, monotonic seconds
        self._changed = asyncio.Event()
        fleet.on_change = self._changed.set

    def takes(self, request: SGLangRequest) -> bool:
        """Whether a request can go through the router now."""
        return self.serves and not request.is_truncated

    async def start(self) -> None:
        """Bring it up with the servers of the fleet.

        Raises:
            EngineFailed: If it does not answer in time, or has servers that the fleet does not.
        """
        if self.process is not None:
            await self.process.kill()
            self.client = self._connect(await self.process.listen())
            await self.process.wait_until_ready(self.client, self._config.start_timeout_s)
        self._requested_at.clear()
        deadline = time.monotonic() + self._config.start_timeout_s
        reason = "can it reach them?"
        while time.monotonic() < deadline:
            try:
                if await self._agree():
                    return
            except ServerFailed as error:
                reason = str(error)
            await asyncio.sleep(_RETRY_S)
        raise EngineFailed(
            f"the router at {self.client.url} did not take up the servers "
            f"{sorted(self._fleet.addresses)} within engine.start_timeout_s = "
            f"{self._config.start_timeout_s:g} s: {reason}"
        )

    async def look_after(self) -> None:
        """Keep its servers those that are up, and bring it back when it is lost itself.

        After several losses in a row it is given up: the run can do without it.
        """
        while True:
            reason = await self._until_lost()
            self.serves = False
            while reason:
                self._log(f"SGLang's router is lost, and not used until it is back: {reason}")
                self._starts += 1
                if self._starts > MOST_STARTS:
                    self._log(
                        f"SGLang's router was lost {MOST_STARTS} times in a row and is given up: "
                        "completions go straight to the servers"
                    )
                    return
                try:
                    await self.start()
                    reason = ""
                except (EngineFailed, OSError) as error:
                    reason = str(error)
                    await asyncio.sleep(_RETRY_S)
            self._log("SGLang's router is back")

    def answered(self) -> None:
        """Note that a completion came through it."""
        self._starts = 0

    async def close(self) -> None:
        """End a router that the run started; remove from any other the servers added to it."""
        if self.process is not None:
            await self.process.kill()
            return
        with suppress(ServerFailed):
            for url, worker in (await self._workers()).items():
                if url in self._known - (self._found or set()):
                    await self._remove(worker)

    async def _until_lost(self) -> str:
        """Keep its servers up to date while it answers; returns the reason when it is lost."""
        ended = asyncio.create_task(self.process.ended()) if self.process else None
        if ended is not None:
            ended.add_done_callback(lambda _: self._changed.set())
        try:
            while True:
                with suppress(TimeoutError):
                    async with asyncio.timeout(_LOOK_EVERY_S if self._is_settled else _RETRY_S):
                        await self._changed.wait()
                self._changed.clear()
                if ended is not None and ended.done():
                    assert self.process is not None
                    return f"its process ended with {ended.result()}:\n{self.process.tail()}"
                try:
                    await self._agree()
                except ServerFailed as error:
                    self.serves = False
                    if time.monotonic() - self.client.last_answer_s > self._config.stall_timeout_s:
                        return str(error)
                except EngineFailed as error:
                    return str(error)
        finally:
            if ended is not None:
                ended.cancel()

    @property
    def _is_settled(self) -> bool:
        return self.serves and not self._requested_at

    async def _workers(self) -> dict[str, dict[str, Any]]:
        answer = await self.client.get("/workers")
        assert isinstance(answer, dict)
        return {worker["url"].rstrip("/"): worker for worker in answer["workers"]}

    async def _remove(self, worker: dict[str, Any]) -> None:
        await self.client.delete(f"/workers/{worker['id']}")

    async def _agree(self) -> bool:
        """Add servers to it and remove others; returns whether it has exactly the right ones.

        Raises:
            EngineFailed: If it has servers that the fleet does not: their weights are unknown.
            ServerFailed: If it does not answer.
        """
        wanted = self._fleet.addresses
        self._known |= wanted
        there = await self._workers()
        if strange := sorted(there.keys() - self._known):
            raise EngineFailed(
                f"the router at {self.client.url} has servers that this run does not have, the "
                f"first is {strange[0]}: name all of them in engine.urls, spelled in the same way, "
                "or use a router of its own"
            )
        if self._found is None:
            self._found = set(there)
        for url in there.keys() - wanted:
            await self._remove(there[url])
        now = time.monotonic()
        for url in wanted - there.keys():
            if now - self._requested_at.get(url, -_ADD_AGAIN_S) >= _ADD_AGAIN_S:
                self._requested_at[url] = now
                await self.client.call("/workers", url=url, api_key=self._server_key)
        well = {url for url in there.keys() & wanted if there[url]["is_healthy"]}
        self._requested_at = {
            url: at for url, at in self._requested_at.items() if url in wanted - well
        }
        self.serves = bool(well)
        return well == wanted == there.keys()


class RouterProcess(ServerProcess):
    """A router that the run starts and ends.

    It sends all requests of a sequence to one server, and those of a new sequence to the server
    with the fewest requests. It repeats no request and checks no server's health: the engine does.

    Args:
        log_path: File for what it prints.
        api_key: The key that it asks its clients for.
        log: Receives its progress.
    """

    def __init__(self, log_path: Path, api_key: str, log: Log) -> None:
        words = ["--policy", "manual", "--assignment-mode", "min_load", "--log-level", "warn"]
        words += ["--request-timeout-secs", str(24 * 3600)]  # callers have deadlines of their own
        flags = ["--disable-retries", "--disable-circuit-breaker", "--disable-health-check"]
        entry = "tir_alp.engines.servers.sglang_router_main"
        super().__init__(
            "SGLang's router",
            [sys.executable, "-m", entry, *words, *flags],
            {OWN_KEY_VARIABLE: api_key},
            log_path,
            log,
            stages=(("", "starting"),),
        )

    async def listen(self) -> str:
        """Start the process; returns the address on which it will listen."""
        port = free_port()
        metrics = ("--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port()))
        await self.start("--host", "127.0.0.1", "--port", str(port), *metrics)
        return f"http://127.0.0.1:{port}"


def make_router(
    config: SGLangConfig,
    fleet: Fleet,
    folder: Path,
    session: aiohttp.ClientSession,
    key: str,
    log: Log,
) -> Router | None:
    """The router that the config names, not yet started; None if it names none.

    Raises:
        ValueError: If it is not installed.
    """
    if config.router == "none":
        return None
    is_local = config.router == "local"
    if is_local and importlib.util.find_spec("sglang_router") is None:
        raise ValueError(
            'engine.router = "local" needs the package sglang-router: install it as '
            "docs/engines.md says, or name a router that runs already by its address"
        )
    given_key = os.environ.get(KEY_VARIABLE)

    def connect(url: str) -> SGLangClient:
        return SGLangClient(
            session,
            url,
            key if is_local else given_key,
            stall_timeout_s=config.stall_timeout_s,
            load_timeout_s=config.load_timeout_s,
        )

    return Router(
        RouterProcess(folder / "router.log", key, log) if is_local else None,
        connect,
        config.router,
        fleet,
        given_key if config.urls else key,
        config,
        log,
    )
