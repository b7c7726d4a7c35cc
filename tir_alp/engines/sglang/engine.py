"""Drives SGLang servers: many completions at a time, over servers that come and go.

New weights wait until the running completions have ended, or they interrupt them: then the tokens
sampled so far stay, their keys and values are computed again, and the rest is sampled by the new
weights. A completion records which weights sampled which tokens. Keeping the old keys and values
would be faster, but then no forward of any weights gives the logprobs that were sampled from, and
the prefix cache would hand old states to later requests.

A completion that a server was sampling when it was lost fails.

Not here: how servers come and go (`sglang.fleet`), and what a router does (`sglang.router`).
"""

from __future__ import annotations

import asyncio
import random
import secrets
import tempfile
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path

import aiohttp
import torch
from torch import Tensor

from tir_alp.config import SGLangConfig
from tir_alp.engines.adapters import MERGED_HINT, snapshot_adapters, target_modules
from tir_alp.engines.base import (
    Completion,
    EngineContext,
    EngineFailed,
    Sampling,
    check_fit,
    check_request,
    check_vocabulary,
)
from tir_alp.engines.probe import ProbeMaker
from tir_alp.engines.servers.http_client import ServerFailed
from tir_alp.engines.servers.weights import WeightSnapshot, snapshot_tensors
from tir_alp.engines.sglang.fleet import Fleet
from tir_alp.engines.sglang.request import SGLangRequest
from tir_alp.engines.sglang.router import make_router
from tir_alp.engines.sglang.routing import RoutingShape, routing_shape
from tir_alp.engines.sglang.server import Server
from tir_alp.training.structure import end_token_ids, load_outline

_RETRY_S = 0.5
_MOST_REMEMBERED = 1 << 16  # sequences and prompts whose server is remembered
_SLACK = 8  # completions more than the least busy server has, at which a prefix is given up
_FIRST_PROBE_TOKENS = 64  # drawn at random while nothing has been sampled


class SGLangEngine:
    """Samples with SGLang servers; `open_sglang` makes one.

    Args:
        config: Settings of the servers.
        context: The run; its seed is that of the servers' draws.
        vocab_size: Number of token ids; all are below it.
        end_token_ids: Tokens at which the model's own config ends a sequence.
        folder: For logs, and for weights if the config names no other folder.
        adapted: Last parts of the names of the layers that adapters extend.
        routing: Shape of a token's routing; None: the model has no experts.
    """

    def __init__(
        self,
        config: SGLangConfig,
        context: EngineContext,
        *,
        vocab_size: int,
        end_token_ids: frozenset[int],
        folder: Path,
        adapted: Sequence[str] = (),
        routing: RoutingShape | None = None,
    ) -> None:
        self._routing = routing
        self._config, self._model_path, self._vocab_size = config, context.path, vocab_size
        self._end_token_ids, self._adapters = end_token_ids, context.adapters
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout()
        )
        key = secrets.token_urlsafe(24)
        self.fleet = Fleet(
            config,
            model_path=context.path,
            snapshot=WeightSnapshot(context.version, None, None),
            seed=context.seed,
            folder=folder,
            session=self._session,
            key=key,
            log=context.log,
            adapters=context.adapters,
            adapted=adapted,
            is_routed=routing is not None,
        )
        self.router = make_router(config, self.fleet, folder, self._session, key, context.log)
        draw = random.Random(context.seed)
        first = [draw.randrange(vocab_size) for _ in range(_FIRST_PROBE_TOKENS)]
        self._probes = ProbeMaker(context.ask_trainer, first)
        self._room = asyncio.Semaphore(config.max_running * len(self.fleet.servers))
        self._homes: OrderedDict[int | tuple[int, ...], Server] = OrderedDict()
        self._requests: set[SGLangRequest] = set()
        self._asked: set[SGLangRequest] = set()  # those that a server has
        self._waits, self._gate = context.on_update == "wait", asyncio.Event()
        self._gate.set()
        self._ended = asyncio.Event()
        self._tokens_generated = self._tokens_cached = 0

    # ------------------------------------------------------------------------ the protocol

    async def start(self) -> None:
        """Bring up all servers, and check that they have the trainer's weights.

        Raises:
            EngineFailed: If one cannot start.
        """
        version = self.fleet.snapshot.version
        # The trainer may have adapters already, which the servers get next.
        probe = None if self._adapters is not None else await self._probes.make()
        self.fleet.snapshot = WeightSnapshot(version, None, probe)
        await self.fleet.start()
        if self.router is not None:
            await self.router.start()
            self.fleet.watch(self.router.look_after(), "SGLang's router")

    async def generate(self, token_ids: tuple[int, ...], sampling: Sampling) -> Completion:
        """Continue a sequence; see `Engine.generate`.

        Raises:
            ValueError: If a token is not in the vocabulary, or the server refuses the request for
                good, e.g. because it is too long.
            EngineFailed: If the server that sampled it was lost.
        """
        check_request(token_ids, sampling)
        check_vocabulary(token_ids, self._vocab_size)
        request = SGLangRequest(token_ids, sampling, self._end_token_ids, self._routing)
        await self._gate.wait()
        self._requests.add(request)
        try:
            async with self._room:
                while not request.is_aborted:
                    await self.fleet.any_serves()
                    try:
                        return await self._sample(request)
                    except ServerFailed as error:
                        if error.refused:
                            raise ValueError(f"a request was refused: {error}") from error
                        if (server := self._server_of(request)) is not None:
                            self.fleet.count_failure(server, error)
                        if error.ran:
                            raise
                    await asyncio.sleep(_RETRY_S)
            return request.aborted_before(self.fleet.snapshot.version)
        finally:
            self._requests.discard(request)
            self._ended.set()

    async def load_weights(self, source: Mapping[str, Tensor] | Path, version: int) -> None:
        """Give new weights to all servers that serve; the others get them when they are back.

        Raises:
            ValueError: If names or shapes differ from those of the previous weights.
            EngineFailed: If no server could take them, and none came back in time.
        """
        dtype = getattr(torch, self._config.dtype)
        copy = snapshot_tensors if self._adapters is None else snapshot_adapters
        tensors = await asyncio.to_thread(copy, source, dtype)
        self._check_shapes(tensors, version)
        probe = await self._probes.make()
        try:
            if self._waits:
                await self._come_to_rest()
            await self.fleet.give(WeightSnapshot(version, tensors, probe))
        finally:
            self._gate.set()
        await self.fleet.any_serves()

    async def lend_memory(self) -> None:
        """As `Engine.lend_memory`, if `engine.release_memory` is set."""
        if not self._config.release_memory:
            return
        try:
            await self._come_to_rest()
            await self.fleet.lend_memory()
        except BaseException:
            self._gate.set()
            raise

    async def abort(self, sequence_uid: int | None = None) -> None:
        """End the completions of one sequence, or all; each returns the tokens that it has."""
        for request in self._requests:
            if sequence_uid in (None, request.sampling.sequence_uid):
                request.is_aborted = True
        for request in [each for each in self._asked if each.is_aborted]:
            await self._take_back(request)

    def health(self) -> Mapping[str, float]:
        """Requests running and waiting, servers that serve, and tokens since the start.

        `tokens_cached` counts tokens of prompts whose keys and values a server still had.
        `tensors_compared` (-1 before the first update) and `probe_difference` describe the checks
        of the newest weights, for the server with the weakest check.
        """
        serving = [server for server in self.fleet.servers if server.serves]
        return {
            "running": len(self._asked),
            "waiting": len(self._requests) - len(self._asked),
            "servers": len(serving),
            "tokens_generated": self._tokens_generated,
            "tokens_cached": self._tokens_cached,
            "tensors_compared": min((each.tensors_compared for each in serving), default=-1),
            "probe_difference": max((each.probe_difference for each in serving), default=0.0),
        }

    async def close(self) -> None:
        """End the servers that the run started, and what runs on all of them."""
        await self.fleet.close()
        if self.router is not None:
            await self.router.close()
        await self._session.close()

    # ------------------------------------------------------------------------ one completion

    def _choose(self, request: SGLangRequest) -> Server:
        """Choose the server that has the longest prefix of a sequence, or the least busy one."""
        serving = [server for server in self.fleet.servers if server.serves]
        least = min(serving, key=lambda server: len(server.requests))
        uid = request.sampling.sequence_uid
        home = self._homes.get(uid)
        if home not in serving:  # its first turn: samples of one prompt go to one server
            home = self._homes.get(request.token_ids, least)
            if home not in serving or len(home.requests) > len(least.requests) + _SLACK:
                home = least
            self._homes[request.token_ids] = home
        self._homes[uid] = home
        while len(self._homes) > _MOST_REMEMBERED:
            self._homes.popitem(last=False)
        return home

    async def _sample(self, request: SGLangRequest) -> Completion:
        """Have a server sample a request: one that is chosen here, or by the router."""
        losses = [server.lost for server in self.fleet.servers]  # one per start
        request.server = asyncio.get_running_loop().create_future()
        with ExitStack() as stack:
            if self.router is not None and self.router.takes(request):
                client = self.router.client
            else:
                chosen = self._choose(request)
                client = chosen.client
                request.server.set_result(chosen.index)
                stack.enter_context(chosen.sampling(request))
            self._asked.add(request)
            running = asyncio.create_task(request.run(client, self._take_back))
            try:
                await asyncio.wait({running, request.server}, return_when=asyncio.FIRST_COMPLETED)
                if (server := self._server_of(request)) is None:
                    running.result()  # raises: no server has answered
                    raise ServerFailed(f"{client.url} sent an empty answer")
                stack.enter_context(server.sampling(request))
                lost = losses[server.index]
                await asyncio.wait({running, lost}, return_when=asyncio.FIRST_COMPLETED)
                if not running.done():
                    raise ServerFailed(f"{server.name} was lost: {lost.result()}")
                completion = running.result()
            finally:
                self._asked.discard(request)
                if not running.done():
                    running.cancel()
                    self.fleet.spawn(self._take_back(request))
        # Weights that arrived meanwhile may yet turn out to be wrong.
        if not await server.until_serving(lost):
            raise ServerFailed(f"{server.name} was lost: {lost.result()}")
        versions = {span.version for span in completion.versions}
        if not versions <= server.versions:
            raise ServerFailed(
                f"{server.name} sampled from weights of versions {sorted(versions)}, of which only "
                f"{sorted(server.versions & versions)} were verified"
            )
        server.failures = server.starts = 0
        if self.router is not None and client is self.router.client:
            self.router.answered()
        self._tokens_generated += len(completion.token_ids)
        self._tokens_cached += request.cached_tokens
        self._probes.note((*request.token_ids, *completion.token_ids))
        return completion

    def _server_of(self, request: SGLangRequest) -> Server | None:
        """The server that has a request; None while only the router knows."""
        if not request.server.done():
            return None
        if (index := request.server.result()) >= len(self.fleet.servers):
            raise ServerFailed(f"an answer is by server {index}, which this engine does not have")
        return self.fleet.servers[index]

    async def _take_back(self, request: SGLangRequest) -> None:
        """Have the server end a request; while it is unknown which, every server."""
        server = self._server_of(request)
        for each in self.fleet.servers if server is None else [server]:
            with suppress(ServerFailed):  # then its stream fails as well
                await each.client.abort(request.id)

    # ------------------------------------------------------------------------------ weights

    async def _come_to_rest(self) -> None:
        """Admit no request, and wait until none runs. Each has a deadline of its caller's."""
        self._gate.clear()
        while self._requests:
            self._ended.clear()
            await self._ended.wait()

    def _check_shapes(self, tensors: Mapping[str, Tensor], version: int) -> None:
        own = self.fleet.snapshot.tensors
        if own is None:
            path = Path(self._model_path)
            if self._adapters is not None or not any(path.glob("*.safetensors")):
                return  # its first adapters, or a Hugging Face id
            own = snapshot_tensors(path, torch.float32)
        check_fit(own, tensors, version)


@asynccontextmanager
async def open_sglang(config: SGLangConfig, context: EngineContext) -> AsyncIterator[SGLangEngine]:
    """Bring servers up, and end those that were started when the block ends; an `EngineFactory`.

    Raises:
        ValueError: If they cannot start, or do not have the weights that they should.
    """
    outline = load_outline(context.path)
    with tempfile.TemporaryDirectory(prefix="tir_alp-sglang-") as folder:
        engine = SGLangEngine(
            config,
            context,
            vocab_size=outline.config.get_text_config().vocab_size,
            end_token_ids=end_token_ids(outline),
            folder=Path(folder),
            adapted=target_modules(outline),
            routing=routing_shape(outline),
        )
        try:
            try:
                await engine.start()
            except (EngineFailed, OSError) as error:
                hint = f"; {MERGED_HINT}" if context.adapters is not None else ""
                raise ValueError(f"the engine cannot start: {error}{hint}") from error
            yield engine
        finally:
            await engine.close()
