"""The servers of an engine: how they come and go, and which of them can be trusted.

A server *serves* once it has the newest weights and both checks of `sglang.weights` have passed. It
is *lost* when its process ends, when it is silent or fails request after request, or when an update
of its weights fails. It serves again only after a restart or a reload, and the same checks. That
holds for servers that the run starts and for servers that run already.

Not here: what they are asked to sample, and by whom.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp

from tir_alp.config import LoraConfig, SGLangConfig
from tir_alp.engines.base import EngineFailed, Log
from tir_alp.engines.probe import check_probe
from tir_alp.engines.servers.http_client import ServerFailed
from tir_alp.engines.servers.weights import WeightSnapshot
from tir_alp.engines.sglang.adapters import (
    AdapterTransfer,
    adapter_arguments,
    verify_adapters,
)
from tir_alp.engines.sglang.client import SGLangClient
from tir_alp.engines.sglang.process import SGLangProcess, server_arguments, server_environment
from tir_alp.engines.sglang.routing import ROUTING_FLAG
from tir_alp.engines.sglang.server import Server
from tir_alp.engines.sglang.weights import (
    DiskTransfer,
    DistributedTransfer,
    TensorCheck,
    TensorTransfer,
    WeightTransfer,
    verify_tensors,
)

KEY_VARIABLE = "TIR_ALP_SGLANG_KEY"
"""Environment variable with the key of servers, and of a router, that run already."""

MOST_STARTS = 3
"""Restarts in a row, without a completion between them, after which the engine gives up."""

_HEALTH_EVERY_S = 5.0
_RETRY_S = 0.5
_MOST_FAILURES = 3  # requests that fail in a row before a server counts as lost


class Fleet:
    """The servers of an engine, and the weights that they have to have.

    Args:
        config: Settings of the servers.
        model_path: Folder or Hugging Face id that servers start from.
        snapshot: The weights in that folder.
        seed: Seed of the servers' draws.
        folder: For logs, and for weights if the config names no other folder.
        session: HTTP session of all connections.
        key: API key of the servers that the run starts.
        log: Receives starts, losses and recoveries.
        adapters: Rank and scale of the adapters that the servers get in place of weights.
        adapted: Last parts of the names of the layers that these extend.
        is_routed: Whether the model has experts, whose routing the servers have to report.
    """

    def __init__(
        self,
        config: SGLangConfig,
        *,
        model_path: str,
        snapshot: WeightSnapshot,
        seed: int,
        folder: Path,
        session: aiohttp.ClientSession,
        key: str,
        log: Log,
        adapters: LoraConfig | None = None,
        adapted: Sequence[str] = (),
        is_routed: bool = False,
    ) -> None:
        self._config, self._model_path, self._seed = config, model_path, seed
        self._folder, self._session, self._log = folder, session, log
        self._key = os.environ.get(KEY_VARIABLE) if config.urls else key
        self.snapshot = snapshot
        self._arguments: list[str] = []
        self._transfer, self._verify = _transfer(config, folder), verify_tensors
        if adapters is not None:
            self._arguments = adapter_arguments(config, adapters.rank, adapted)
            self._transfer = AdapterTransfer(adapters, config.tensor_parallel)
            self._verify = verify_adapters
        if is_routed:
            self._arguments = [*self._arguments, ROUTING_FLAG]
        self._weights_lock = asyncio.Lock()
        self.servers = self._make_servers()
        self.on_change: Callable[[], None] = lambda: None
        """Called whenever `addresses` has changed."""
        self._changed = asyncio.Event()
        self._memory_is_ours = asyncio.Event()
        self._memory_is_ours.set()
        self._broken: EngineFailed | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def addresses(self) -> set[str]:
        """Addresses of the servers that are up."""
        return {server.client.url for server in self.servers if server.is_up}

    async def start(self) -> None:
        """Bring up all servers, and check that they have the weights of the snapshot.

        Raises:
            EngineFailed: If one cannot start.
        """
        await asyncio.gather(*(self._bring_up(server) for server in self.servers))
        for server in self.servers:
            self.watch(self._look_after(server), server.name)

    async def give(self, snapshot: WeightSnapshot) -> None:
        """Give weights to all servers that serve; the others get them when they are back."""
        async with self._weights_lock:
            self.snapshot = snapshot
            self._memory_is_ours.set()
            up = [server for server in self.servers if server.is_up]
            await asyncio.gather(*(self._update(server) for server in up))

    async def lend_memory(self) -> None:
        """Free the memory of all servers until weights are given to them. Nothing may run."""
        async with self._weights_lock:
            self._memory_is_ours.clear()
            up = [server for server in self.servers if server.is_up]
            await asyncio.gather(*(self._lend(server) for server in up))

    async def any_serves(self) -> None:
        """Wait for a server that serves. Raises EngineFailed if none can come back any more."""
        timeout_s = self._config.start_timeout_s * MOST_STARTS
        try:
            async with asyncio.timeout(timeout_s):
                while not any(server.serves for server in self.servers):
                    if self._broken is not None:
                        raise self._broken
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise EngineFailed(f"no SGLang server served for {timeout_s:g} s") from None

    def count_failure(self, server: Server, error: ServerFailed) -> None:
        """Count a failed request. After several in a row the server is lost."""
        server.failures += 1
        if server.failures >= _MOST_FAILURES:
            self._lose(server, f"{server.failures} requests failed in a row, the last one: {error}")

    def watch(self, work: Coroutine[Any, Any, None], whose: str) -> None:
        """Supervise something until `close`. If supervision fails, so does the engine.

        Args:
            work: Notices losses, and repairs them.
            whose: Name of what it supervises, for messages.
        """

        async def watched() -> None:
            try:
                await work
            except Exception as error:  # nobody awaits this task
                if not isinstance(error, EngineFailed):
                    error = EngineFailed(f"{whose} is no longer supervised: {error!r}")
                self._log(str(error))
                self._broken = error
                self._changed.set()

        self.spawn(watched())

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something until it ends, or until `close`."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """End the servers that the run started, and give the others their memory back."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for server in self.servers:
            if server.process is not None:
                await server.process.kill()
            elif server.memory_is_lent:
                with suppress(ServerFailed):
                    await server.client.resume_memory()
        self._transfer.close()

    # ------------------------------------------------------------------------------ weights

    async def _update(self, server: Server) -> None:
        """Give a server that is up the newest weights. The weights' lock is held."""
        lost = server.lost
        try:
            await self._load(server)
        except EngineFailed as error:
            self._lose(server, f"its weights could not be updated: {error}")
        else:
            if not lost.done():  # else it is being started again, and gets these weights there
                self._serve(server)

    async def _load(self, server: Server) -> None:
        """Give a server the newest weights, and verify them. The weights' lock is held.

        No request reaches it meanwhile, and no completion of it is returned.
        """
        client, snapshot = server.client, self.snapshot
        server.hold()
        if server.memory_is_lent:
            await client.resume_memory()
            server.memory_is_lent = False
        if snapshot.tensors is not None:
            await client.pause()
            try:
                await self._transfer.send(client, snapshot)
            except (RuntimeError, OSError) as error:  # of the process group, or of the disk
                self._transfer.forget(client)
                with suppress(ServerFailed):  # else it could not begin another update
                    await client.call("/end_weight_update")
                if isinstance(error, EngineFailed):
                    raise
                raise EngineFailed(f"weights could not be sent to {client.url}: {error}") from error
            checked = await self._verify(client, snapshot)
            await client.resume()
            self._log_check(server, checked)
        server.probe_difference = 0.0
        if snapshot.probe is not None:
            server.probe_difference = check_probe(
                snapshot.probe,
                await client.prompt_logprobs(snapshot.probe.token_ids),
                self._config.dtype,
                server=client.url,
                version=snapshot.version,
            )

    def _serve(self, server: Server) -> None:
        server.serve(self.snapshot.version)
        self._changed.set()

    async def _lend(self, server: Server) -> None:
        server.hold()
        try:
            await server.client.release_memory()
            server.memory_is_lent = True
        except ServerFailed as error:
            self._lose(server, f"its memory could not be released: {error}")

    def _log_check(self, server: Server, checked: TensorCheck) -> None:
        """Log how weights are verified, the first time and whenever that has changed."""
        if checked.num_compared != server.tensors_compared:
            probe = "the logprobs of a probe" if self.snapshot.probe else "no probe"
            self._log(
                f"{server.name}: new weights are verified by {checked.num_compared} "
                f"tensors, equal to the last bit (digest {checked.digest}), and {probe}"
                if checked.num_compared
                else f"{server.name} reports no tensors of this model: new weights are verified by "
                f"{probe} alone"
            )
        server.tensors_compared = checked.num_compared

    # -------------------------------------------------------------------------- come and go

    def _make_servers(self) -> list[Server]:
        config, model_path = self._config, self._model_path
        if config.urls:
            servers = [Server(index, url, None) for index, url in enumerate(config.urls)]
            for server in servers:
                server.connection = self._connect(server, server.name)
            return servers
        if importlib.util.find_spec("sglang") is None:
            raise ValueError(
                'engine.type = "sglang" needs the package sglang: install it as docs/engines.md '
                "says, or name servers that run already with engine.urls"
            )
        assert self._key is not None
        given = (model_path, self.snapshot.version, self._seed)
        names = [f"SGLang server {index}" for index in range(config.num_servers)]
        return [
            Server(
                index,
                name,
                SGLangProcess(
                    name,
                    server_arguments(config, *given, index, self._arguments),
                    server_environment(config, model_path),
                    self._folder / f"server_{index}.log",
                    self._key,
                    self._log,
                ),
            )
            for index, name in enumerate(names)
        ]

    def _connect(self, server: Server, url: str) -> SGLangClient:
        return SGLangClient(
            self._session,
            url,
            self._key,
            stall_timeout_s=self._config.stall_timeout_s,
            load_timeout_s=self._config.load_timeout_s,
            index=server.index,
        )

    async def _bring_up(self, server: Server) -> None:
        """Start a server, or wait for one that runs already, and give it the newest weights."""
        server.begin_start()
        if server.process is not None:
            await server.process.kill()
            server.connection = self._connect(server, await server.process.listen())
            server.versions, server.memory_is_lent = set(), False
            await server.process.wait_until_ready(server.client, self._config.start_timeout_s)
        else:
            await self._wait_for(server)
        async with self._weights_lock:
            await self._load(server)
            self._serve(server)

    async def _wait_for(self, server: Server) -> None:
        """Wait for a server that the run did not start.

        It is resumed first: one that was left paused would not look healthy.
        """
        began, client = time.monotonic(), server.client
        while time.monotonic() - began < self._config.start_timeout_s:
            with suppress(ServerFailed):
                await client.resume()
                await client.prompt_logprobs((0, 0))  # faster than /health, which waits a second
                if self.snapshot.tensors is None:
                    label = client.label(self.snapshot.version)
                    await client.call("/update_weight_version", new_version=label)
                return
            await asyncio.sleep(_RETRY_S)
        raise EngineFailed(f"there is no healthy SGLang server at {server.name}")

    async def _look_after(self, server: Server) -> None:
        """Notice that a server is lost, and bring it back, for ever."""
        while True:
            self._lose(server, await self._until_lost(server))
            await self._bring_back(server)

    async def _until_lost(self, server: Server) -> str:
        ended = asyncio.create_task(server.process.ended()) if server.process else None
        try:
            while True:
                waited_for = {server.lost, *([ended] if ended else [])}
                await asyncio.wait(
                    waited_for, timeout=_HEALTH_EVERY_S, return_when=asyncio.FIRST_COMPLETED
                )
                if ended is not None and ended.done():
                    assert server.process is not None
                    return f"its process ended with {ended.result()}:\n{server.process.tail()}"
                if server.lost.done():
                    return server.lost.result()
                client, limit = server.client, self._config.stall_timeout_s
                if not server.serves or time.monotonic() - client.last_answer_s < _HEALTH_EVERY_S:
                    continue
                if await client.is_healthy() or not server.serves:
                    continue
                if time.monotonic() - client.last_answer_s > limit:  # no request was answered
                    return f"it has not answered for {limit:g} s"
        finally:
            if ended is not None:
                ended.cancel()

    def _lose(self, server: Server, reason: str) -> None:
        if server.lose(reason):
            self._log(f"{server.name} is lost: {reason}")
            self.on_change()

    async def _bring_back(self, server: Server) -> None:
        reason = server.lost.result()
        if server.process is not None:
            with suppress(EngineFailed):  # the next start tries again
                await server.process.kill()
        await self._memory_is_ours.wait()
        while True:
            server.starts += 1
            if server.starts > MOST_STARTS:
                raise EngineFailed(
                    f"{server.name} was lost {MOST_STARTS} times in a row, the last time: {reason}"
                )
            if server.connection is not None:
                self._transfer.forget(server.connection)
            try:
                await self._bring_up(server)
            except (EngineFailed, OSError) as error:  # the latter: the machine is full
                reason = str(error)
                self._log(f"{server.name} did not come back: {reason}")
                await asyncio.sleep(_RETRY_S)
                continue
            finally:
                server.failures = 0
            self.on_change()
            self._log(f"{server.name} is back, with verified weights of {self.snapshot.version}")
            return


def _transfer(config: SGLangConfig, folder: Path) -> WeightTransfer:
    match config.weights:
        case "disk":
            return DiskTransfer(config.weights_folder or folder)
        case "tensor":
            return TensorTransfer(config.tensor_parallel)
        case "distributed":
            backend = "gloo" if config.device == "cpu" else "nccl"
            return DistributedTransfer(backend, num_ranks=config.tensor_parallel)
