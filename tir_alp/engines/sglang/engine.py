"""Drives SGLang servers: many completions at a time, over servers that come and go.

New weights wait until what runs has ended, or they interrupt it: then the tokens sampled so far
stay, their keys and values are computed again, and the rest is sampled by the new weights. A
completion says which weights sampled which tokens. Keeping the old keys and values would be faster,
but then no forward of any weights gives the logprobs that were sampled from, and the prefix cache
would hand old states to later requests.

What a server was sampling when it was lost is refused.

Not here: how servers come and go (`sglang_fleet`), and what a router does (`sglang_router`).
"""

from __future__ import annotations

import asyncio
import random
import secrets
import tempfile
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path

import aiohttp
import torch
from torch import Tensor

from tir_alp.config import SGLangConfig
from tir_alp.engines.base import (
    AskTrainer,
    Completion,
    EngineFailed,
    Probe,
    Sampling,
    check_fit,
    check_request,
    check_vocabulary,
)
from tir_alp.engines.servers.http_client import ServerFailed
from tir_alp.engines.servers.weights import WeightSnapshot, snapshot_tensors
from tir_alp.engines.sglang.fleet import Fleet, Server
from tir_alp.engines.sglang.request import SGLangRequest
from tir_alp.engines.sglang.router import make_router

_RETRY_S = 0.5
_MOST_REMEMBERED = 1 << 16  # sequences and prompts whose server is remembered
_SLACK = 8  # completions that a server may be ahead of the least busy one, for a prefix's sake
_PROBE_TOKENS = 256


class SGLangEngine:
    """Samples with SGLang servers; `open_sglang` makes one.

    Args:
        config: Of the servers.
        model_path: Folder or Hugging Face id that servers start from.
        version: Policy version of those weights.
        vocab_size: Tokens have ids below it.
        end_token_ids: At which the model's own config ends a sequence.
        seed: Of the servers' draws.
        folder: For logs, and for weights if the config names no other.
        ask_trainer: What the servers are checked against; None: sampled tensors alone.
        on_update: What new weights do to running completions: "keep" or "wait".
        log: Told of starts, losses and recoveries.
    """

    def __init__(
        self,
        config: SGLangConfig,
        *,
        model_path: str,
        version: int,
        vocab_size: int,
        end_token_ids: frozenset[int],
        seed: int,
        folder: Path,
        ask_trainer: AskTrainer | None,
        on_update: str,
        log: Callable[[str], None],
    ) -> None:
        self._config, self._model_path, self._vocab_size = config, model_path, vocab_size
        self._end_token_ids = end_token_ids
        self._seed, self._ask_trainer = seed, ask_trainer
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout()
        )
        key = secrets.token_urlsafe(24)
        self.fleet = Fleet(
            config,
            model_path=model_path,
            snapshot=WeightSnapshot(version, None, None),
            seed=seed,
            folder=folder,
            session=self._session,
            key=key,
            log=log,
        )
        self.router = make_router(config, self.fleet, folder, self._session, key, log)
        self._recent: tuple[int, ...] = ()
        self._room = asyncio.Semaphore(config.max_running * len(self.fleet.servers))
        self._homes: OrderedDict[int | tuple[int, ...], Server] = OrderedDict()
        self._requests: set[SGLangRequest] = set()
        self._asked: set[SGLangRequest] = set()
        self._waits, self._gate = on_update == "wait", asyncio.Event()
        self._gate.set()
        self._ended = asyncio.Event()
        self._tokens_generated = self._tokens_cached = 0

    # ------------------------------------------------------------------------ the protocol

    async def start(self) -> None:
        """Bring up all servers, and check that they sample what the trainer would.

        Raises:
            EngineFailed: If one cannot start.
        """
        version = self.fleet.snapshot.version
        self.fleet.snapshot = WeightSnapshot(version, None, await self._make_probe())
        await self.fleet.start()
        if self.router is not None:
            await self.router.start()
            self.fleet.watch(self.router.look_after(), "SGLang's router")

    async def generate(self, token_ids: tuple[int, ...], sampling: Sampling) -> Completion:
        """Continue a sequence; see `Engine.generate`.

        Raises:
            ValueError: If a token is not in the vocabulary, or a server says that it can never
                sample this.
            EngineFailed: If the server that sampled it was lost.
        """
        check_request(token_ids, sampling)
        check_vocabulary(token_ids, self._vocab_size)
        request = SGLangRequest(token_ids, sampling, self._end_token_ids)
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
        """Take new weights on all servers that serve; the others get them when they are back.

        Raises:
            ValueError: If names or shapes are not those of the weights before.
            EngineFailed: If no server could take them, and none came back in time.
        """
        dtype = getattr(torch, self._config.dtype)
        tensors = await asyncio.to_thread(snapshot_tensors, source, dtype)
        self._check_shapes(tensors, version)
        probe = await self._make_probe()
        try:
            if self._waits:
                await self._come_to_rest()
            await self.fleet.give(WeightSnapshot(version, tensors, probe))
        finally:
            self._gate.set()
        await self.fleet.any_serves()

    async def lend_memory(self) -> None:
        """As `Engine.lend_memory`, where `engine.release_memory` says so."""
        if not self._config.release_memory:
            return
        try:
            await self._come_to_rest()
            await self.fleet.lend_memory()
        except BaseException:
            self._gate.set()
            raise

    async def abort(self, sequence_uid: int | None = None) -> None:
        """End the completions of one sequence, or all, with what they have."""
        for request in self._requests:
            if sequence_uid in (None, request.sampling.sequence_uid):
                request.is_aborted = True
        for request in [each for each in self._asked if each.is_aborted]:
            await self._take_back(request)

    def health(self) -> Mapping[str, float]:
        """Requests running and waiting, servers that serve, tokens made since the start.

        And how many tokens of prompts were not read, as the server had their keys and values.
        Also what verified the newest weights of these servers, of the worst one: the number of
        tensors that were compared, -1 before the first sync, and the mean |difference of logprobs|
        of the probe.
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
        """End our servers, and what runs on them."""
        await self.fleet.close()
        if self.router is not None:
            await self.router.close()
        await self._session.close()

    # ------------------------------------------------------------------------ one completion

    def _choose(self, request: SGLangRequest) -> Server:
        """Take the server that has the longest prefix of a sequence, or the least busy one."""
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
        """Have a server sample a request: the one that we choose, or that the router does."""
        losses = [server.lost for server in self.fleet.servers]  # one that is back has another
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
                    running.result()  # which raises: nobody has answered
                    raise ServerFailed(f"{client.url} answered with nothing")
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
        # Weights that came meanwhile may yet turn out to be wrong.
        await self._settled(server, lost)
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
        self._recent = (*request.token_ids, *completion.token_ids)[:_PROBE_TOKENS]
        return completion

    def _server_of(self, request: SGLangRequest) -> Server | None:
        """The server that has a request; None while only a router knows."""
        if not request.server.done():
            return None
        if (index := request.server.result()) >= len(self.fleet.servers):
            raise ServerFailed(f"an answer is by server {index}, which is none of this engine's")
        return self.fleet.servers[index]

    async def _settled(self, server: Server, lost: asyncio.Future[str]) -> None:
        if not server.settled.is_set():
            settling = asyncio.create_task(server.settled.wait())
            await asyncio.wait({settling, lost}, return_when=asyncio.FIRST_COMPLETED)
            settling.cancel()
        if lost.done():
            raise ServerFailed(f"{server.name} was lost: {lost.result()}")

    async def _take_back(self, request: SGLangRequest) -> None:
        server = self._server_of(request)
        for each in self.fleet.servers if server is None else [server]:
            with suppress(ServerFailed):  # then its stream fails as well
                await each.client.abort(request.id)

    # ------------------------------------------------------------------------------ weights

    async def _come_to_rest(self) -> None:
        """Let nothing in, and wait until nothing runs: whoever asked for a completion limits it."""
        self._gate.clear()
        while self._requests:
            self._ended.clear()
            await self._ended.wait()

    async def _make_probe(self) -> Probe | None:
        if self._ask_trainer is None:
            return None
        draw = random.Random(self._seed)
        token_ids = self._recent
        if len(token_ids) < 2:
            token_ids = tuple(draw.randrange(self._vocab_size) for _ in range(_PROBE_TOKENS // 4))
        return await self._ask_trainer(token_ids)

    def _check_shapes(self, tensors: Mapping[str, Tensor], version: int) -> None:
        own = self.fleet.snapshot.tensors
        if own is None:
            path = Path(self._model_path)
            if not any(path.glob("*.safetensors")):
                return  # a Hugging Face id
            own = snapshot_tensors(path, torch.float32)
        check_fit(own, tensors, version)


@asynccontextmanager
async def open_sglang(
    config: SGLangConfig,
    *,
    model_path: str,
    version: int = 0,
    vocab_size: int,
    end_token_ids: frozenset[int],
    seed: int = 0,
    ask_trainer: AskTrainer | None = None,
    on_update: str = "keep",
    log: Callable[[str], None] = print,
) -> AsyncIterator[SGLangEngine]:
    """Bring servers up, and take down behind the block those that we started.

    The arguments are those of `SGLangEngine`.

    Raises:
        ValueError: If they cannot start, or do not sample what they should.
    """
    with tempfile.TemporaryDirectory(prefix="tir_alp-sglang-") as folder:
        engine = SGLangEngine(
            config,
            model_path=model_path,
            version=version,
            vocab_size=vocab_size,
            end_token_ids=end_token_ids,
            seed=seed,
            folder=Path(folder),
            ask_trainer=ask_trainer,
            on_update=on_update,
            log=log,
        )
        try:
            try:
                await engine.start()
            except (EngineFailed, OSError) as error:
                raise ValueError(f"the engine cannot start: {error}") from error
            yield engine
        finally:
            await engine.close()
