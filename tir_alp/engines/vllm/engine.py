"""Drives one vLLM server, which has a Python of its own, over a socket in a private folder.

New weights wait until the running completions have ended, and no request is admitted meanwhile, as
with the embedded engine's `wait`. vLLM could also go on with new weights in the middle of a
completion, and it does record which weights sampled which tokens; but it then keeps the keys and
values of the old weights, and no forward of any weights gives the logprobs that were sampled from.

A server that ends or fails to take weights is not started again: the run stops and can be resumed.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import aiohttp
import torch
from torch import Tensor

from tir_alp.config import LoraConfig, VLLMConfig
from tir_alp.engines.adapters import MERGED_HINT, snapshot_adapters, write_adapters
from tir_alp.engines.base import (
    AskTrainer,
    Completion,
    EngineContext,
    EngineFailed,
    Sampling,
    check_fit,
    check_request,
    check_vocabulary,
)
from tir_alp.engines.probe import ProbeMaker, check_probe
from tir_alp.engines.servers.http_client import ServerFailed
from tir_alp.engines.servers.process import ServerProcess
from tir_alp.engines.servers.weights import WeightSnapshot, snapshot_tensors, write_version
from tir_alp.engines.vllm.process import SOCKET, server_process, with_head, write_start
from tir_alp.engines.vllm.request import VLLMClient, VLLMRequest
from tir_alp.training.policy import load_policy
from tir_alp.training.structure import load_outline

_PROBE_TOKENS = 64


class VLLMEngine:
    """Samples with one vLLM server; `open_vllm` makes one.

    Args:
        config: Settings of the server.
        client: Client of the server.
        folder: A folder for weights, which the server can read.
        snapshot: The weights that it has. Only the names and shapes of the tensors are kept.
        vocab_size: Number of token ids; all are below it.
        ask_trainer: Asks the trainer for the logprobs that the server's are compared with; None:
            they are not compared.
        adapters: Rank and scale of the adapters that it gets in place of weights.
    """

    def __init__(
        self,
        config: VLLMConfig,
        client: VLLMClient,
        folder: Path,
        snapshot: WeightSnapshot,
        vocab_size: int,
        ask_trainer: AskTrainer | None,
        adapters: LoraConfig | None = None,
    ) -> None:
        self._adapters = adapters
        self._first_adapters: Mapping[str, Tensor] | None = None
        self._config, self._client, self._folder = config, client, folder
        self._snapshot = _outline(snapshot)
        self._vocab_size = vocab_size
        first = range(min(_PROBE_TOKENS, vocab_size))
        self._probes = ProbeMaker(ask_trainer, first, _PROBE_TOKENS)
        self._room = asyncio.Semaphore(config.max_running)
        self._requests: set[VLLMRequest] = set()
        self._running: set[VLLMRequest] = set()
        self._is_open, self._is_idle = asyncio.Event(), asyncio.Event()
        self._is_open.set()
        self._is_idle.set()
        self._weights_lock = asyncio.Lock()
        self._broken: EngineFailed | None = None
        self._probe_difference, self._tokens_generated = 0.0, 0

    async def generate(self, token_ids: tuple[int, ...], sampling: Sampling) -> Completion:
        """Continue a sequence; see `Engine.generate`.

        Raises:
            ValueError: If a token is not in the vocabulary, or the server refuses the request for
                good, e.g. because it is too long.
            EngineFailed: If the server failed.
        """
        check_request(token_ids, sampling)
        check_vocabulary(token_ids, self._vocab_size)
        request = VLLMRequest(token_ids, sampling)
        self._requests.add(request)
        try:
            async with self._room:
                await self._admitted(request)
                if request.aborted.is_set():
                    return request.completion(self._snapshot.version)
                return await self._run(request)
        finally:
            self._requests.discard(request)

    async def load_weights(self, source: Mapping[str, Tensor] | Path, version: int) -> None:
        """Take new weights as soon as the running completions have ended.

        Raises:
            ValueError: If names or shapes differ from those of the previous weights; nothing is
                changed.
            EngineFailed: If the server does not take them, or samples from others afterwards. The
                engine refuses all requests from then on.
        """
        async with self._weights_lock:
            self._is_open.clear()
            try:
                snapshot = await self._snapshot_of(source, version)
                await self._is_idle.wait()
                try:
                    await self._load(snapshot)
                except BaseException as error:  # even if cancelled: it may have some of the weights
                    self.fail(f"its weights were not updated: {error!r}")
                    raise
            finally:
                self._is_open.set()

    async def lend_memory(self) -> None:
        """Do nothing: the server keeps its memory."""

    async def abort(self, sequence_uid: int | None = None) -> None:
        """End the completions of one sequence, or all; each returns the tokens that it has."""
        for request in self._requests:
            if sequence_uid in (None, request.sampling.sequence_uid):
                request.aborted.set()

    def health(self) -> Mapping[str, float]:
        """Requests running and waiting, tokens generated, and the probe's difference in nats."""
        return {
            "running": len(self._running),
            "waiting": len(self._requests) - len(self._running),
            "tokens_generated": self._tokens_generated,
            "probe_difference": self._probe_difference,
        }

    async def close(self) -> None:
        """End what runs; the server ends with `open_vllm`."""
        await self.abort()

    def fail(self, reason: str) -> None:
        """Refuse every request from now on."""
        self._broken = self._broken or EngineFailed(f"the vLLM server is lost: {reason}")

    async def take_up(self, process: ServerProcess) -> None:
        """Wait until the server has started, and check that it has the weights of its folder.

        Raises:
            EngineFailed: If it does not answer in time, or has other weights.
        """
        await process.wait_until_ready(self._client, self._config.start_timeout_s)
        version = self._snapshot.version
        await self._client.call("/update_weight_version", new_version=str(version))
        if self._adapters is None:  # else the trainer may have some already, which it gets next
            self._snapshot = replace(self._snapshot, probe=await self._probes.make())
            await self._verify()

    async def _verify(self) -> None:
        """Compare the server's logprobs of the snapshot's probe with the trainer's."""
        version, probe = self._snapshot.version, self._snapshot.probe
        if probe is not None:
            reported = await self._client.prompt_logprobs(probe.token_ids)
            dtype, url = self._config.dtype, self._client.url
            self._probe_difference = check_probe(
                probe, reported, dtype, server=url, version=version
            )

    async def _admitted(self, request: VLLMRequest) -> None:
        """Wait until no weights are being loaded, or the request is aborted."""
        while not self._is_open.is_set() and not request.aborted.is_set():
            waits = [asyncio.create_task(e.wait()) for e in (self._is_open, request.aborted)]
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()
        if self._broken is not None:
            raise self._broken

    async def _run(self, request: VLLMRequest) -> Completion:
        self._running.add(request)
        self._is_idle.clear()
        try:
            completion = await request.run(self._client, self._snapshot.version)
        except ServerFailed as error:
            if error.refused:
                raise ValueError(f"a request was refused: {error}") from error
            raise
        finally:  # its connection is closed, which ends what the server still samples
            self._running.discard(request)
            if not self._running:
                self._is_idle.set()
        self._tokens_generated += len(completion.token_ids)
        self._probes.note((*request.token_ids, *completion.token_ids))
        return completion

    async def _snapshot_of(
        self, source: Mapping[str, Tensor] | Path, version: int
    ) -> WeightSnapshot:
        dtype = getattr(torch, self._config.dtype)
        if self._adapters is not None:
            tensors = await asyncio.to_thread(snapshot_adapters, source, dtype)
            check_fit(self._first_adapters or tensors, tensors, version)
            return WeightSnapshot(version, tensors, await self._probes.make())
        tensors = await asyncio.to_thread(snapshot_tensors, source, dtype, every_name=True)
        assert self._snapshot.tensors is not None
        tensors = with_head(tensors)
        check_fit(self._snapshot.tensors, tensors, version)
        return WeightSnapshot(version, tensors, await self._probes.make())

    async def _load(self, snapshot: WeightSnapshot) -> None:
        if self._broken is not None:
            raise self._broken
        if self._adapters is None:
            path = await asyncio.to_thread(write_version, self._folder, snapshot)
            await self._client.load(path, snapshot.version)
        else:
            await self._load_adapter(self._adapters, snapshot)
        self._snapshot = _outline(snapshot)
        await self._verify()

    async def _load_adapter(self, config: LoraConfig, snapshot: WeightSnapshot) -> None:
        assert snapshot.tensors is not None
        with tempfile.TemporaryDirectory(dir=self._folder, prefix="adapter-") as name:
            path = Path(name) / str(snapshot.version)
            await asyncio.to_thread(write_adapters, path, config, snapshot.tensors)
            await self._client.load_adapter(path, snapshot.version)
        self._first_adapters = self._first_adapters or _outline(snapshot).tensors


def _outline(snapshot: WeightSnapshot) -> WeightSnapshot:
    """The snapshot without its data, which a lost server is not given again."""
    assert snapshot.tensors is not None
    return replace(snapshot, tensors={n: t.to("meta") for n, t in snapshot.tensors.items()})


@asynccontextmanager
async def connected(
    config: VLLMConfig,
    socket: Path,
    folder: Path,
    snapshot: WeightSnapshot,
    vocab_size: int,
    ask_trainer: AskTrainer | None = None,
    adapters: LoraConfig | None = None,
) -> AsyncIterator[VLLMEngine]:
    """Open an engine over a server that listens on a socket.

    The other arguments are those of `VLLMEngine`.
    """
    async with aiohttp.ClientSession(
        connector=aiohttp.UnixConnector(str(socket), limit=0), timeout=aiohttp.ClientTimeout()
    ) as session:
        client = VLLMClient(
            session,
            "http://localhost",
            None,
            stall_timeout_s=config.stall_timeout_s,
            load_timeout_s=config.load_timeout_s,
        )
        engine = VLLMEngine(config, client, folder, snapshot, vocab_size, ask_trainer, adapters)
        try:
            yield engine
        finally:
            await engine.close()


@asynccontextmanager
async def open_vllm(config: VLLMConfig, context: EngineContext) -> AsyncIterator[VLLMEngine]:
    """Bring a server up, and end it when the block ends; an `EngineFactory`.

    Raises:
        ValueError: If it cannot start, or does not have the weights that it should.
    """
    outline = load_outline(context.path)
    is_folder = Path(context.path).is_dir()
    weights = Path(context.path) if is_folder else load_policy(context.path).state_dict()
    with tempfile.TemporaryDirectory(prefix="tir_alp-vllm-") as name:
        folder = Path(name)
        start = write_start(folder / "start", outline, weights, getattr(torch, config.dtype))
        snapshot = _outline(WeightSnapshot(context.version, start, None))
        del start, weights  # they are as large as the model
        process = server_process(config, folder, context.seed, context.log, context.adapters)
        vocab_size = outline.config.get_text_config().vocab_size
        run = (context.ask_trainer, context.adapters)
        opened = connected(config, folder / SOCKET, folder, snapshot, vocab_size, *run)
        try:
            async with opened as engine:
                try:
                    await process.start()
                    await engine.take_up(process)
                except (EngineFailed, OSError) as error:
                    hint = f"; {MERGED_HINT}" if context.adapters is not None else ""
                    raise ValueError(f"the engine cannot start: {error}{hint}") from error
                watch = asyncio.create_task(_watch(process, engine))
                try:
                    yield engine
                finally:
                    watch.cancel()
        finally:
            await process.kill()


async def _watch(process: ServerProcess, engine: VLLMEngine) -> None:
    engine.fail(f"its process ended with {await process.ended()}:\n{process.tail()}")
