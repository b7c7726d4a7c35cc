"""Drives SGLang servers: many completions at a time, over servers that come and go.

Started by us or there already, each server is in one of two states. It *serves* once it has the
newest weights and both checks of `sglang_weights` have passed. It is *lost* when its process ends,
when it is silent or fails request after request, or when an update of its weights fails. What a
lost server was sampling is refused, and it serves again only after a restart or a reload, and the
same checks.

New weights wait until what runs has ended, or they interrupt it: then the tokens sampled so far
stay, their keys and values are computed again, and the rest is sampled by the new weights. A
completion says which weights sampled which tokens. Keeping the old
keys and values would be faster, but then no forward of any weights gives the logprobs that were
sampled from, and the prefix cache would hand old states to later requests.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import random
import secrets
import tempfile
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import aiohttp
import torch
from torch import Tensor

from tir_alp.config import SGLangConfig
from tir_alp.engines.base import (
    Completion,
    EngineFailed,
    Sampling,
    check_fit,
    check_request,
    check_vocabulary,
)
from tir_alp.engines.http_client import ServerFailed
from tir_alp.engines.sglang_client import SGLangClient
from tir_alp.engines.sglang_process import SGLangProcess
from tir_alp.engines.sglang_request import SGLangRequest
from tir_alp.engines.sglang_weights import (
    DiskTransfer,
    DistributedTransfer,
    TensorCheck,
    TensorTransfer,
    WeightTransfer,
    verify_tensors,
)
from tir_alp.engines.weights import (
    Probe,
    Reference,
    WeightSnapshot,
    snapshot_tensors,
    verify_probe,
)

KEY_VARIABLE = "TIR_ALP_SGLANG_KEY"
"""Environment variable with the key of servers that run already."""

_HEALTH_EVERY_S = 5.0
_RETRY_S = 0.5
_MOST_FAILURES = 3  # requests of a server in a row; then it is lost
_MOST_STARTS = 3  # in a row, without a completion between them
_MOST_REMEMBERED = 1 << 16  # sequences and prompts whose server is remembered
_SLACK = 8  # completions that a server may be ahead of the least busy one, for a prefix's sake
_PROBE_TOKENS = 256


class _Server:
    """What the engine knows of one server."""

    def __init__(self, name: str, client: SGLangClient | None, process: SGLangProcess | None):
        self.name = name
        self.client = client
        self.process = process
        self.requests: set[SGLangRequest] = set()
        self.versions: set[int] = set()
        self.failures = self.starts = 0
        self.tensors_compared = -1
        """In the check behind the newest weights; -1 before the first."""
        self.probe_difference = 0.0
        """Mean |difference| in the other one, in nats."""
        self.held = True
        """Not to be asked for its health, e.g. while it loads."""
        self.settled = asyncio.Event()
        """Set while the weights that it samples from are verified."""
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    @property
    def serves(self) -> bool:
        return self.settled.is_set() and not self.lost.done()


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
        reference: What the servers are checked against; None: sampled tensors alone.
        on_update: What new weights do to running completions: "keep" or "wait".
        say: Told of starts, losses and recoveries.
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
        reference: Reference | None,
        on_update: str,
        say: Callable[[str], None],
    ) -> None:
        self._config, self._model_path, self._vocab_size = config, model_path, vocab_size
        self._end_token_ids = end_token_ids
        self._seed, self._folder, self._reference, self._say = seed, folder, reference, say
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout()
        )
        self._key = secrets.token_urlsafe(24)
        self._snapshot = WeightSnapshot(version, None, None)
        self._recent: tuple[int, ...] = ()
        self._transfer = _transfer(config, folder)
        self._weights_lock = asyncio.Lock()
        self._servers = self._make_servers()
        self._room = asyncio.Semaphore(config.max_running * len(self._servers))
        self._homes: OrderedDict[int | tuple[int, ...], _Server] = OrderedDict()
        self._requests: set[SGLangRequest] = set()
        self._waits, self._gate = on_update == "wait", asyncio.Event()
        self._gate.set()
        self._ended = asyncio.Event()
        self._changed = asyncio.Event()
        self._broken: EngineFailed | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._tokens_generated = 0

    # ------------------------------------------------------------------------ the protocol

    async def start(self) -> None:
        """Bring up all servers, and check that they sample what the trainer would.

        Raises:
            EngineFailed: If one cannot start.
        """
        self._snapshot = WeightSnapshot(self._snapshot.version, None, await self._make_probe())
        await asyncio.gather(*(self._bring_up(server) for server in self._servers))
        for server in self._servers:
            self._spawn(self._look_after(server))

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
                    server = await self._choose(request)
                    try:
                        return await self._sample(server, request)
                    except ServerFailed as error:
                        if error.refused:
                            raise ValueError(f"a request was refused: {error}") from error
                        self._count_failure(server, error)
                        if error.ran:
                            raise
                    await asyncio.sleep(_RETRY_S)
            return request.aborted_before(self._snapshot.version)
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
        async with self._at_rest(), self._weights_lock:
            self._snapshot = WeightSnapshot(version, tensors, probe)
            ready = [server for server in self._servers if not server.lost.done()]
            await asyncio.gather(*(self._load_or_lose(server) for server in ready))
        await self._any_serves(self._config.start_timeout_s * _MOST_STARTS)

    async def abort(self, sequence_uid: int | None = None) -> None:
        """End the completions of one sequence, or all, with what they have."""
        for request in self._requests:
            if sequence_uid in (None, request.sampling.sequence_uid):
                request.is_aborted = True
        for server in self._servers:
            for request in [each for each in server.requests if each.is_aborted]:
                with suppress(ServerFailed):  # then its stream fails as well
                    await self._client(server).abort(request.id)

    def health(self) -> Mapping[str, float]:
        """Requests running and waiting, servers that serve, tokens made since the start.

        Also what verified the newest weights of these servers, of the worst one: the number of
        tensors that were compared, -1 before the first sync, and the mean |difference of logprobs|
        of the probe.
        """
        running = sum(len(server.requests) for server in self._servers)
        serving = [server for server in self._servers if server.serves]
        return {
            "running": running,
            "waiting": len(self._requests) - running,
            "servers": len(serving),
            "tokens_generated": self._tokens_generated,
            "tensors_compared": min((each.tensors_compared for each in serving), default=-1),
            "probe_difference": max((each.probe_difference for each in serving), default=0.0),
        }

    async def close(self) -> None:
        """End our servers, and what runs on them."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for server in self._servers:
            if server.process is not None:
                await server.process.kill()
        await self._session.close()
        self._transfer.close()

    @asynccontextmanager
    async def memory_released(self) -> AsyncIterator[None]:
        """Give the servers' memory to a trainer on the same GPUs for as long as the block runs.

        Nothing may run. The weights are gone behind it: `load_weights` has to come next, and until
        then requests wait. Servers need `--enable-memory-saver` among `engine.arguments`.
        """
        servers = [server for server in self._servers if server.serves]
        tags = ["kv_cache", "weights"]
        for server in servers:
            self._hold(server)
            await self._client(server).flush_cache()
            await self._client(server).call("/release_memory_occupation", tags=tags)
        try:
            yield
        finally:
            for server in servers:
                await self._client(server).call("/resume_memory_occupation", tags=tags)

    # ------------------------------------------------------------------------ one completion

    async def _choose(self, request: SGLangRequest) -> _Server:
        """Take the server that has the longest prefix of a sequence, or the least busy one."""
        await self._any_serves(self._config.start_timeout_s * _MOST_STARTS)
        serving = [server for server in self._servers if server.serves]
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

    async def _sample(self, server: _Server, request: SGLangRequest) -> Completion:
        client = self._client(server)
        lost = server.lost
        server.requests.add(request)
        running = asyncio.create_task(request.run(client))
        try:
            await asyncio.wait({running, lost}, return_when=asyncio.FIRST_COMPLETED)
            if not running.done():
                raise ServerFailed(f"{server.name} was lost: {lost.result()}")
            completion = running.result()
        finally:
            server.requests.discard(request)
            if not running.done():
                running.cancel()
                self._spawn(self._take_back(server, request))
        # Weights that came meanwhile may yet turn out to be wrong.
        await self._settled(server, lost)
        versions = {span.version for span in completion.versions}
        if not versions <= server.versions:
            raise ServerFailed(
                f"{server.name} sampled from weights of versions {sorted(versions)}, of which only "
                f"{sorted(server.versions & versions)} were verified"
            )
        server.failures = server.starts = 0
        self._tokens_generated += len(completion.token_ids)
        self._recent = (*request.token_ids, *completion.token_ids)[:_PROBE_TOKENS]
        return completion

    async def _settled(self, server: _Server, lost: asyncio.Future[str]) -> None:
        if not server.settled.is_set():
            settling = asyncio.create_task(server.settled.wait())
            await asyncio.wait({settling, lost}, return_when=asyncio.FIRST_COMPLETED)
            settling.cancel()
        if lost.done():
            raise ServerFailed(f"{server.name} was lost: {lost.result()}")

    async def _take_back(self, server: _Server, request: SGLangRequest) -> None:
        with suppress(ServerFailed):
            await self._client(server).abort(request.id)

    def _count_failure(self, server: _Server, error: ServerFailed) -> None:
        server.failures += 1
        if server.failures >= _MOST_FAILURES:
            self._lose(server, f"{server.failures} requests failed in a row, the last one: {error}")

    # ------------------------------------------------------------------------------ weights

    @asynccontextmanager
    async def _at_rest(self) -> AsyncIterator[None]:
        """If weights are to wait, until nothing runs: whoever asked for a completion limits it."""
        if not self._waits:
            yield
            return
        self._gate.clear()
        try:
            while self._requests:
                self._ended.clear()
                await self._ended.wait()
            yield
        finally:
            self._gate.set()

    async def _make_probe(self) -> Probe | None:
        if self._reference is None:
            return None
        draw = random.Random(self._seed)
        token_ids = self._recent
        if len(token_ids) < 2:
            token_ids = tuple(draw.randrange(self._vocab_size) for _ in range(_PROBE_TOKENS // 4))
        return Probe(token_ids, tuple(await self._reference(token_ids)))

    def _check_shapes(self, tensors: Mapping[str, Tensor], version: int) -> None:
        own = self._snapshot.tensors
        if own is None:
            path = Path(self._model_path)
            if not any(path.glob("*.safetensors")):
                return  # a Hugging Face id
            own = snapshot_tensors(path, torch.float32)
        check_fit(own, tensors, version)

    async def _load_or_lose(self, server: _Server) -> None:
        try:
            await self._load(server)
        except EngineFailed as error:
            self._lose(server, f"its weights could not be updated: {error}")

    async def _load(self, server: _Server) -> None:
        """Give a server the newest weights, and verify them. The weights' lock is held."""
        client, snapshot = self._client(server), self._snapshot
        self._hold(server)
        if snapshot.tensors is not None:
            await client.pause()
            try:
                await self._transfer.send(client, snapshot)
            except (RuntimeError, OSError) as error:  # of the group, or of the disk
                self._transfer.forget(client)
                with suppress(ServerFailed):  # else it could not begin another one
                    await client.call("/end_weight_update")
                if isinstance(error, EngineFailed):
                    raise
                raise EngineFailed(f"weights could not be sent to {client.url}: {error}") from error
            checked = await verify_tensors(client, snapshot)
            await client.go_on()
            self._say_checked(server, checked)
        server.probe_difference = await verify_probe(client, snapshot, self._config.dtype) or 0.0
        server.versions.add(snapshot.version)
        server.held = False
        server.settled.set()
        self._changed.set()

    def _say_checked(self, server: _Server, checked: TensorCheck) -> None:
        """Say how weights are verified, where it is the first time or not as it was before."""
        if checked.num_compared != server.tensors_compared:
            probe = "the logprobs of a probe" if self._snapshot.probe else "no probe"
            self._say(
                f"{server.name}: new weights are verified by {checked.num_compared} sampled "
                f"tensors, equal to the last bit (digest {checked.digest}), and {probe}"
                if checked.num_compared
                else f"{server.name} reports no tensors of this model: new weights are verified by "
                f"{probe} alone"
            )
        server.tensors_compared = checked.num_compared

    def _hold(self, server: _Server) -> None:
        """No new requests, and no completion gets out, until the weights are verified."""
        server.held = True
        server.settled.clear()

    # ---------------------------------------------------------------------------- the servers

    def _make_servers(self) -> list[_Server]:
        config, model_path = self._config, self._model_path
        if config.urls:
            return [_Server(url, self._connect(url), None) for url in config.urls]
        if importlib.util.find_spec("sglang") is None:
            raise ValueError(
                'engine.type = "sglang" needs the package sglang: install it as docs/sglang.md '
                "says, or name servers that run already with engine.urls"
            )
        return [
            _Server(
                f"SGLang server {index}",
                None,
                SGLangProcess(
                    f"SGLang server {index}",
                    server_arguments(config, model_path, self._snapshot.version, self._seed, index),
                    server_environment(config, model_path),
                    self._folder / f"server_{index}.log",
                    self._key,
                    self._say,
                ),
            )
            for index in range(config.num_servers)
        ]

    def _connect(self, url: str) -> SGLangClient:
        return SGLangClient(
            self._session,
            url,
            os.environ.get(KEY_VARIABLE) if self._config.urls else self._key,
            stall_timeout_s=self._config.stall_timeout_s,
            load_timeout_s=self._config.load_timeout_s,
        )

    def _client(self, server: _Server) -> SGLangClient:
        assert server.client is not None
        return server.client

    async def _bring_up(self, server: _Server) -> None:
        """Start a server, or wait for one that is not ours, and give it the newest weights."""
        if server.process is not None:
            await server.process.kill()
            server.client = self._connect(await server.process.listen())
            server.versions = set()
            await server.process.wait_until_ready(server.client, self._config.start_timeout_s)
        else:
            await self._wait_for(server)
        async with self._weights_lock:
            await self._load(server)

    async def _wait_for(self, server: _Server) -> None:
        """Wait for a server that is not ours; one that we left paused would not look healthy."""
        began, client = time.monotonic(), self._client(server)
        while time.monotonic() - began < self._config.start_timeout_s:
            with suppress(ServerFailed):
                await client.go_on()
                if await client.is_healthy():
                    if self._snapshot.tensors is None:
                        version = str(self._snapshot.version)
                        await client.call("/update_weight_version", new_version=version)
                    return
            await asyncio.sleep(_RETRY_S)
        raise EngineFailed(f"there is no healthy SGLang server at {server.name}")

    async def _look_after(self, server: _Server) -> None:
        """Notice that a server is lost, and bring it back."""
        try:
            while True:
                self._lose(server, await self._until_lost(server))
                await self._bring_back(server)
        except Exception as error:  # nobody would notice that this task is no more
            if not isinstance(error, EngineFailed):
                error = EngineFailed(f"{server.name} is not looked after any more: {error!r}")
            self._say(str(error))
            self._broken = error
            self._changed.set()

    async def _until_lost(self, server: _Server) -> str:
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
                client, limit = self._client(server), self._config.stall_timeout_s
                if server.held or time.monotonic() - client.heard < _HEALTH_EVERY_S:
                    continue
                if await client.is_healthy() or server.held:
                    continue
                if time.monotonic() - client.heard > limit:  # nor has any request been answered
                    return f"it has said nothing for {limit:g} s"
        finally:
            if ended is not None:
                ended.cancel()

    def _lose(self, server: _Server, reason: str) -> None:
        server.settled.clear()
        if not server.lost.done():
            server.lost.set_result(reason)
            self._say(f"{server.name} is lost: {reason}")

    async def _bring_back(self, server: _Server) -> None:
        reason = server.lost.result()
        while True:
            server.starts += 1
            if server.starts > _MOST_STARTS:
                raise EngineFailed(
                    f"{server.name} was lost {_MOST_STARTS} times in a row, the last time: {reason}"
                )
            if server.client is not None:
                self._transfer.forget(server.client)
            try:
                await self._bring_up(server)
            except (EngineFailed, OSError) as error:  # of the server, or of a machine that is full
                reason = str(error)
                self._say(f"{server.name} did not come back: {reason}")
                await asyncio.sleep(_RETRY_S)
                continue
            finally:
                server.failures = 0
            server.lost = asyncio.get_running_loop().create_future()
            self._changed.set()
            self._say(f"{server.name} is back, with verified weights of {self._snapshot.version}")
            return

    async def _any_serves(self, timeout_s: float) -> None:
        """Wait for a server that serves. Raises EngineFailed if there cannot be one any more."""
        try:
            async with asyncio.timeout(timeout_s):
                while not any(server.serves for server in self._servers):
                    if self._broken is not None:
                        raise self._broken
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise EngineFailed(f"no SGLang server served for {timeout_s:g} s") from None

    def _spawn(self, work) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


@asynccontextmanager
async def open_sglang(
    config: SGLangConfig,
    *,
    model_path: str,
    version: int = 0,
    vocab_size: int,
    end_token_ids: frozenset[int],
    seed: int = 0,
    reference: Reference | None = None,
    on_update: str = "keep",
    say: Callable[[str], None] = print,
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
            reference=reference,
            on_update=on_update,
            say=say,
        )
        try:
            try:
                await engine.start()
            except (EngineFailed, OSError) as error:
                raise ValueError(f"the engine cannot start: {error}") from error
            yield engine
        finally:
            await engine.close()


def server_arguments(
    config: SGLangConfig, model_path: str, version: int, seed: int, index: int
) -> list[str]:
    """Words of the command line of the server number `index`."""
    words = {
        "--model-path": model_path,
        "--weight-version": version,
        "--device": config.device,
        "--dtype": config.dtype,
        "--max-running-requests": config.max_running,
        "--tp-size": config.tensor_parallel,
        "--random-seed": (seed + index) % (1 << 30),
    }
    flags = ["--skip-tokenizer-init", "--incremental-streaming-output", "--skip-server-warmup"]
    if config.max_cache_tokens is not None:
        words["--max-total-tokens"] = config.max_cache_tokens
    if config.device == "cpu":
        words["--attention-backend"] = "torch_native"
        flags += ["--disable-overlap-schedule", "--sleep-on-idle"]  # cores are shared with others
    else:
        words["--base-gpu-id"] = config.first_gpu + index * config.tensor_parallel
    pairs = [str(word) for pair in words.items() for word in pair]
    return [*pairs, *flags, *config.arguments]


def server_environment(config: SGLangConfig, model_path: str) -> dict[str, str]:
    """What a server's environment has beside ours."""
    environment = {"TOKENIZERS_PARALLELISM": "false"}
    if config.device == "cpu":
        environment["SGLANG_USE_CPU_ENGINE"] = "1"
        # A thread that waits for another one by spinning costs the trainer a core.
        environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
    if Path(model_path).is_dir():
        environment["HF_HUB_OFFLINE"] = "1"
    return environment


def _transfer(config: SGLangConfig, folder: Path) -> WeightTransfer:
    match config.weights:
        case "disk":
            return DiskTransfer(config.weights_folder or folder)
        case "tensor":
            return TensorTransfer(config.tensor_parallel)
        case "distributed":
            backend = "gloo" if config.device == "cpu" else "nccl"
            return DistributedTransfer(backend, num_ranks=config.tensor_parallel)
