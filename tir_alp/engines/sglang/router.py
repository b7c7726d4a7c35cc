"""SGLang's own router in front of the servers: it picks the server of a completion, and no more.

Weights, checks, aborts and questions of health go to the servers themselves, since a router knows
nothing of weights. It has the servers that are not lost, no others. Which of them sampled a
completion is told by the completion: each server gives its weights names of its own.

Completions that a router cannot pass on go straight to a server: those under `top_p`, whose support
it drops from the request, and all of them while it is lost.
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
from tir_alp.engines.base import EngineFailed
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
    """A router and what is known of it; `make_router` makes one.

    Args:
        process: Its process; None: somebody else's.
        connect: Makes a client of a router at an address.
        url: Of somebody else's.
        fleet: The servers that it is to have.
        server_key: That they ask for.
        config: For deadlines.
        log: Told of losses and recoveries.
    """

    def __init__(
        self,
        process: RouterProcess | None,
        connect: Callable[[str], SGLangClient],
        url: str,
        fleet: Fleet,
        server_key: str | None,
        config: SGLangConfig,
        log: Callable[[str], None],
    ) -> None:
        self.process, self._connect = process, connect
        self.client = connect(url)
        self._fleet, self._server_key = fleet, server_key
        self._config, self._log = config, log
        self.serves = False
        """Whether it can be asked: it answers, and has a server."""
        self._starts = 0
        self._known: set[str] = set()  # addresses that servers of ours have, or had
        self._found: set[str] | None = None  # those that it had before us
        self._asked_for: dict[str, float] = {}
        self._changed = asyncio.Event()
        fleet.on_change = self._changed.set

    def takes(self, request: SGLangRequest) -> bool:
        """Whether a request can go through it now."""
        return self.serves and not request.is_truncated

    async def start(self) -> None:
        """Bring it up with the servers that there are.

        Raises:
            EngineFailed: If it does not answer in time, or has servers of others.
        """
        if self.process is not None:
            await self.process.kill()
            self.client = self._connect(await self.process.listen())
            await self.process.wait_until_ready(self.client, self._config.start_timeout_s)
        self._asked_for.clear()
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
        """Keep its servers those that are not lost, and bring it back when it is lost itself.

        Where that does not help, it is given up: the run can do without it.
        """
        while True:
            reason = await self._until_lost()
            self.serves = False
            while reason:
                self._log(f"SGLang's router is lost, and not asked until it is back: {reason}")
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
        """A completion came through it."""
        self._starts = 0

    async def close(self) -> None:
        """End it if it is ours, and else take out of it what we have put there."""
        if self.process is not None:
            await self.process.kill()
            return
        with suppress(ServerFailed):
            for url, worker in (await self._workers()).items():
                if url in self._known - (self._found or set()):
                    await self._remove(worker)

    async def _until_lost(self) -> str:
        """Look after its servers for as long as it answers; returns what is wrong then."""
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
                    if time.monotonic() - self.client.heard > self._config.stall_timeout_s:
                        return str(error)
                except EngineFailed as error:
                    return str(error)
        finally:
            if ended is not None:
                ended.cancel()

    @property
    def _is_settled(self) -> bool:
        return self.serves and not self._asked_for

    async def _workers(self) -> dict[str, dict[str, Any]]:
        said = await self.client.get("/workers")
        assert isinstance(said, dict)
        return {worker["url"].rstrip("/"): worker for worker in said["workers"]}

    async def _remove(self, worker: dict[str, Any]) -> None:
        await self.client.delete(f"/workers/{worker['id']}")

    async def _agree(self) -> bool:
        """Add servers to it and take some out; returns whether it has those that it should have.

        Raises:
            EngineFailed: If it has servers that are not ours: nothing is known of their weights.
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
            if now - self._asked_for.get(url, -_ADD_AGAIN_S) >= _ADD_AGAIN_S:
                self._asked_for[url] = now
                await self.client.call("/workers", url=url, api_key=self._server_key)
        well = {url for url in there.keys() & wanted if there[url]["is_healthy"]}
        self._asked_for = {url: at for url, at in self._asked_for.items() if url in wanted - well}
        self.serves = bool(well)
        return well == wanted == there.keys()


class RouterProcess(ServerProcess):
    """A router that we start and end.

    It sends all requests of a sequence to one server, and those of a new sequence to the one with
    the fewest. It makes no request twice, and asks no server for its health: that is our business.

    Args:
        log_path: File that gets what it prints.
        api_key: What it asks of its clients.
        log: Told of its progress.
    """

    def __init__(self, log_path: Path, api_key: str, log: Callable[[str], None]) -> None:
        words = ["--policy", "manual", "--assignment-mode", "min_load", "--log-level", "warn"]
        words += ["--request-timeout-secs", str(24 * 3600)]  # who asks has a deadline
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
        """Start the process; returns the address at which it is going to listen."""
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
    log: Callable[[str], None],
) -> Router | None:
    """The router that the config asks for, not yet started; None if it asks for none.

    Raises:
        ValueError: If it is not installed.
    """
    if config.router == "none":
        return None
    is_ours = config.router == "local"
    if is_ours and importlib.util.find_spec("sglang_router") is None:
        raise ValueError(
            'engine.router = "local" needs the package sglang-router: install it as docs/sglang.md '
            "says, or name a router that runs already by its address"
        )
    given_key = os.environ.get(KEY_VARIABLE)

    def connect(url: str) -> SGLangClient:
        return SGLangClient(
            session,
            url,
            key if is_ours else given_key,
            stall_timeout_s=config.stall_timeout_s,
            load_timeout_s=config.load_timeout_s,
        )

    return Router(
        RouterProcess(folder / "router.log", key, log) if is_ours else None,
        connect,
        config.router,
        fleet,
        given_key if config.urls else key,
        config,
        log,
    )
