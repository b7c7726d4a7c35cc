"""Drives one vLLM server, which has a Python of its own, over a socket in a private folder.

Completions that run are waited for before new weights are taken, and nothing is admitted meanwhile,
as by the embedded engine. vLLM could also go on with new weights in mid-generation, and it does say
which weights sampled which tokens; but it then keeps the keys and values of the old ones, and no
forward of any weights gives the logprobs that were sampled from.

A server that ends or fails to take weights is not started again: the run stops and can be resumed.
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import torch
from safetensors.torch import save_file
from torch import Tensor

from tir_alp.config import VLLMConfig
from tir_alp.engines.base import (
    Completion,
    EngineFailed,
    Sampling,
    check_fit,
    check_request,
    check_vocabulary,
)
from tir_alp.engines.http_client import ServerClient, ServerFailed
from tir_alp.engines.server_process import ServerProcess
from tir_alp.engines.weights import (
    Probe,
    Reference,
    WeightSnapshot,
    snapshot_tensors,
    verify_probe,
    write_version,
)
from tir_alp.types import StopReason

SOCKET = "socket"
"""Name of the server's socket in its folder."""

_PROBE_TOKENS = 64
_CACHE_BLOCK = 32  # tokens
_RETRY_S = 0.2
_STAGES = (
    ("", "importing vLLM"),
    ("Initializing a V1 LLM engine", "starting its processes"),
    ("Loading weights took", "allocating the cache"),
    ("Started server process", "answering"),
)


class VLLMClient(ServerClient):
    """Talks to the server."""

    async def prompt_logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """Logprob of each token but the first, given those before it, at temperature 1."""
        parameters = {"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0}
        said = await self.call(
            "/inference/v1/generate", token_ids=list(token_ids), sampling_params=parameters
        )
        assert isinstance(said, dict)
        rows = zip(token_ids[1:], said["prompt_logprobs"][1:], strict=True)
        return [row[str(token_id)]["logprob"] for token_id, row in rows]

    async def load(self, path: Path, version: int) -> None:
        """Read weights from a folder; forget the keys and values of the old ones, and count."""
        await self.call(
            "/collective_rpc",
            self.load_timeout_s,
            method="reload_weights",
            kwargs={"weights_path": str(path)},
        )
        async with self._deadline("did not empty its cache", self._stall_timeout_s):
            while True:  # a request that was taken back may hold some of it for a moment
                with suppress(ServerFailed):
                    await self.call("/reset_prefix_cache")
                    break
                await asyncio.sleep(_RETRY_S)
        await self.call("/update_weight_version", new_version=str(version))


class _Request:
    """A completion in the making."""

    def __init__(self, token_ids: tuple[int, ...], sampling: Sampling) -> None:
        self.id = uuid.uuid4().hex
        self.token_ids, self.sampling = token_ids, sampling
        self.aborted = asyncio.Event()
        self._matches = sampling.stop_matcher() if sampling.stop_matcher else None
        self._sampled: list[int] = []
        self._logprobs: list[float] = []
        self._stop: StopReason | None = None

    async def run(self, client: VLLMClient, version: int) -> Completion:
        """Have the server sample it, once.

        Raises:
            ServerFailed: If the server refuses or fails, or samples with other weights than those
                of `version`.
        """
        sampling = self.sampling
        payload = {
            "request_id": self.id,
            "token_ids": list(self.token_ids),
            "stream": True,
            "sampling_params": {
                "max_tokens": sampling.max_tokens,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "stop_token_ids": sorted(sampling.stop_token_ids),
                "ignore_eos": True,  # no token ends a completion but those
                "logprobs": 0,  # of the sampled token alone
            },
        }
        last = None
        events = client.stream("/inference/v1/generate", payload, _is_last)
        async with aclosing(events):
            async for event in events:
                last = event["choices"][0]
                self._take(last, client.url)
                if self._stop is not None:
                    break
                if self.aborted.is_set():
                    self._stop = StopReason.ABORT
                    break
        assert last is not None  # a stream has an event, or fails
        if self._stop is None:
            self._stop = self._ending(last, client.url, version)
        return self.completion(version)

    def completion(self, version: int) -> Completion:
        """What it has, or nothing if it was taken back before it ran."""
        return Completion(
            token_ids=tuple(self._sampled),
            logprobs=tuple(self._logprobs),
            stop_reason=self._stop or StopReason.ABORT,
            policy_version=version,
        )

    def _take(self, choice: Mapping[str, Any], url: str) -> None:
        """Take the tokens of an event up to where the completion ends."""
        new_ids = choice["token_ids"] or []
        entries = choice["logprobs"]["content"] if choice["logprobs"] else []
        if [entry["token_id"] for entry in entries] != new_ids:
            raise ServerFailed(f"{url} gave logprobs of other tokens than it sampled")
        for entry in entries:
            self._sampled.append(entry["token_id"])
            # At temperature 0 only one token could be sampled.
            self._logprobs.append(entry["logprob"] if self.sampling.temperature > 0 else 0.0)
            if entry["token_id"] in self.sampling.stop_token_ids:
                self._stop = StopReason.EOS
            elif self._matches is not None and self._matches(entry["token_id"]):
                self._stop = StopReason.STOP
            if self._stop is not None:
                return

    def _ending(self, choice: Mapping[str, Any], url: str, version: int) -> StopReason:
        by = {each["version"] for each in choice["weight_versions"] or ()}
        if by != {str(version)}:
            raise ServerFailed(f"{url} sampled with weights of {sorted(by)}, and not of {version}")
        if choice["finish_reason"] == "abort" and self.aborted.is_set():
            return StopReason.ABORT
        if choice["finish_reason"] != "length":
            raise ServerFailed(f"{url} gave a request up: {choice['finish_reason']}")
        if len(self._sampled) < self.sampling.max_tokens:  # it does not refuse what is too long
            raise ServerFailed(
                f"a sequence of {len(self.token_ids)} tokens with {self.sampling.max_tokens} to "
                "come does not fit into the server's context; see --max-model-len, or lower "
                "rollout.max_context_tokens",
                refused=True,
            )
        return StopReason.LENGTH


def _is_last(event: Mapping[str, Any]) -> bool:
    return event["choices"][0]["finish_reason"] is not None


class VLLMEngine:
    """Samples with one vLLM server; `open_vllm` makes one.

    Args:
        config: Of the server.
        client: Talks to it.
        folder: That it can read, too: for weights.
        snapshot: The weights that it has.
        vocab_size: Tokens have ids below it.
        reference: What the server is checked against; None: not at all.
    """

    def __init__(
        self,
        config: VLLMConfig,
        client: VLLMClient,
        folder: Path,
        snapshot: WeightSnapshot,
        vocab_size: int,
        reference: Reference | None,
    ) -> None:
        self._config, self._client, self._folder = config, client, folder
        self._snapshot, self._vocab_size, self._reference = snapshot, vocab_size, reference
        self._room = asyncio.Semaphore(config.max_running)
        self._requests: set[_Request] = set()
        self._running: set[_Request] = set()
        self._is_open, self._is_idle = asyncio.Event(), asyncio.Event()
        self._is_open.set()
        self._is_idle.set()
        self._weights_lock = asyncio.Lock()
        self._broken: EngineFailed | None = None
        self._probe_difference, self._tokens_generated = 0.0, 0
        self._recent: tuple[int, ...] = ()

    async def generate(self, token_ids: tuple[int, ...], sampling: Sampling) -> Completion:
        """Continue a sequence; see `Engine.generate`.

        Raises:
            ValueError: If a token is not in the vocabulary, or the server says that it can never
                sample this.
            EngineFailed: If the server failed.
        """
        check_request(token_ids, sampling)
        check_vocabulary(token_ids, self._vocab_size)
        request = _Request(token_ids, sampling)
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
        """Take new weights as soon as the completions that run now have ended.

        Raises:
            ValueError: If names or shapes are not those of the weights before; nothing is changed.
            EngineFailed: If the server does not take them, or samples from others afterwards. It
                samples no more then.
        """
        async with self._weights_lock:
            self._is_open.clear()
            try:
                snapshot = await self._snapshot_of(source, version)
                await self._is_idle.wait()
                try:
                    await self._load(snapshot)
                except BaseException as error:  # also cancelled: it may have some of the weights
                    self.fail(f"its weights were not updated: {error!r}")
                    raise
            finally:
                self._is_open.set()

    async def abort(self, sequence_uid: int | None = None) -> None:
        """End the completions of one sequence, or all, with what they have."""
        for request in self._requests:
            if sequence_uid in (None, request.sampling.sequence_uid):
                request.aborted.set()

    def health(self) -> Mapping[str, float]:
        """Requests running and waiting, tokens made, and what the check of the weights found."""
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
        """Refuse everything from now on."""
        self._broken = self._broken or EngineFailed(f"the vLLM server is lost: {reason}")

    async def take_up(self, process: ServerProcess) -> None:
        """Wait for the server that starts, and see that it has the weights of its folder.

        Raises:
            EngineFailed: If it does not answer in time, or has others.
        """
        await process.wait_until_ready(self._client, self._config.start_timeout_s)
        version = self._snapshot.version
        await self._client.call("/update_weight_version", new_version=str(version))
        self._snapshot = replace(self._snapshot, probe=await self._make_probe())
        await self._verify()

    async def _verify(self) -> None:
        """Compare the server's logprobs of a sequence with those of the reference."""
        difference = await verify_probe(self._client, self._snapshot, self._config.dtype)
        self._probe_difference = difference or 0.0

    async def _make_probe(self) -> Probe | None:
        """A sequence, of the last completion if there is one, and what the reference says of it."""
        if self._reference is None:
            return None
        ids = self._recent or tuple(range(min(_PROBE_TOKENS, self._vocab_size)))
        return Probe(ids, tuple(await self._reference(ids)))

    async def _admitted(self, request: _Request) -> None:
        """Wait until no weights are on their way, or the request is taken back."""
        while not self._is_open.is_set() and not request.aborted.is_set():
            waits = [asyncio.create_task(e.wait()) for e in (self._is_open, request.aborted)]
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()
        if self._broken is not None:
            raise self._broken

    async def _run(self, request: _Request) -> Completion:
        self._running.add(request)
        self._is_idle.clear()
        try:
            completion = await request.run(self._client, self._snapshot.version)
        except ServerFailed as error:
            if error.refused:
                raise ValueError(f"a request was refused: {error}") from error
            raise
        finally:  # its connection is closed, and with it ends what the server still samples
            self._running.discard(request)
            if not self._running:
                self._is_idle.set()
        self._tokens_generated += len(completion.token_ids)
        self._recent = (*request.token_ids, *completion.token_ids)[:_PROBE_TOKENS]
        return completion

    async def _snapshot_of(
        self, source: Mapping[str, Tensor] | Path, version: int
    ) -> WeightSnapshot:
        dtype = getattr(torch, self._config.dtype)
        tensors = await asyncio.to_thread(snapshot_tensors, source, dtype, every_name=True)
        assert self._snapshot.tensors is not None
        tensors = with_head(tensors)
        check_fit(self._snapshot.tensors, tensors, version)
        return WeightSnapshot(version, tensors, await self._make_probe())

    async def _load(self, snapshot: WeightSnapshot) -> None:
        if self._broken is not None:
            raise self._broken
        path = await asyncio.to_thread(write_version, self._folder, snapshot)
        await self._client.load(path, snapshot.version)
        self._snapshot = snapshot
        await self._verify()


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def with_head(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give weights a head of their own, where it is tied to the embedding and so has no name."""
    if HEAD in tensors or EMBEDDING not in tensors:
        return dict(tensors)
    return {**tensors, HEAD: tensors[EMBEDDING].clone()}


@asynccontextmanager
async def connected(
    config: VLLMConfig,
    socket: Path,
    folder: Path,
    snapshot: WeightSnapshot,
    vocab_size: int,
    reference: Reference | None = None,
) -> AsyncIterator[VLLMEngine]:
    """An engine over a server that listens on a socket; the arguments are those of `VLLMEngine`."""
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
        engine = VLLMEngine(config, client, folder, snapshot, vocab_size, reference)
        try:
            yield engine
        finally:
            await engine.close()


@asynccontextmanager
async def open_vllm(
    config: VLLMConfig,
    outline: Any,
    weights: Mapping[str, Tensor],
    *,
    version: int = 0,
    seed: int = 0,
    reference: Reference | None = None,
    say: Callable[[str], None] = print,
) -> AsyncIterator[VLLMEngine]:
    """Bring a server up, and take it down behind the block.

    Args:
        config: Of the server.
        outline: A model with the architecture that it is to serve; its own weights do not matter.
        weights: That it starts with.
        version: Their policy version.
        seed: Of the server's draws.
        reference: Logprobs by the trainer's forward; None: what the server says is not checked.
        say: Told of the start.

    Raises:
        ValueError: If it cannot start, or does not sample what it should.
    """
    with tempfile.TemporaryDirectory(prefix="tir_alp-vllm-") as name:
        folder = Path(name)
        tensors = write_start(folder / "start", outline, weights, getattr(torch, config.dtype))
        process = server_process(config, folder, seed, say)
        vocab_size = outline.config.get_text_config().vocab_size
        snapshot = WeightSnapshot(version, tensors, None)
        opened = connected(config, folder / SOCKET, folder, snapshot, vocab_size, reference)
        try:
            async with opened as engine:
                try:
                    await process.start()
                    await engine.take_up(process)
                except (EngineFailed, OSError) as error:
                    raise ValueError(f"the engine cannot start: {error}") from error
                watch = asyncio.create_task(_watch(process, engine))
                try:
                    yield engine
                finally:
                    watch.cancel()
        finally:
            await process.kill()


async def _watch(process: ServerProcess, engine: VLLMEngine) -> None:
    engine.fail(f"its process ended with {await process.ended()}:\n{process.tail()}")


def write_start(
    folder: Path, outline: Any, weights: Mapping[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Write the folder that a server starts from; returns the tensors that are in it.

    A head that is tied to the embedding is written, and served, as one of its own: vLLM's CPU build
    goes on with the head that it packed at its start when a tied model gets new weights.
    """
    tensors = with_head(snapshot_tensors(weights, dtype, every_name=True))
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = outline.config.to_dict() | {
        "architectures": [type(outline).__name__],
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config, default=str))
    return tensors


def server_process(
    config: VLLMConfig, folder: Path, seed: int, say: Callable[[str], None]
) -> ServerProcess:
    """The server of a folder that `write_start` has written `start` into.

    Raises:
        ValueError: If there is no such Python.
    """
    if not os.access(config.python, os.X_OK):
        raise ValueError(
            f"engine.python = {str(config.python)!r} is no program: give the Python of an "
            "environment with vLLM, made as docs/sglang.md says"
        )
    words = {
        "--model": folder / "start",
        "--uds": folder / SOCKET,
        "--dtype": config.dtype,
        "--max-num-seqs": config.max_running,
        "--tensor-parallel-size": config.tensor_parallel,
        "--seed": seed % (1 << 30),
        "--logprobs-mode": "processed_logprobs",  # those that are sampled from
    }
    flags = ["--skip-tokenizer-init", "--enable-scale-out"]  # which is ids in and ids out
    environment = {
        "VLLM_SERVER_DEV_MODE": "1",  # to take weights
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # so that its processes die with it
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if config.max_cache_tokens is not None:
        words["--block-size"] = _CACHE_BLOCK
        words["--num-gpu-blocks-override"] = -(-config.max_cache_tokens // _CACHE_BLOCK)
        # GiB that have to be free, or else 92 % of the memory have to; the blocks are as many as
        # the line above says.
        environment["VLLM_CPU_KVCACHE_SPACE"] = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")
    if config.device == "cpu":
        flags.append("--enforce-eager")
        environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
    else:
        gpus = range(config.first_gpu, config.first_gpu + config.tensor_parallel)
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
    return ServerProcess(
        "vLLM server",
        [
            *(str(config.python), "-P", str(Path(__file__).with_name("vllm_server.py"))),
            *(str(word) for pair in words.items() for word in pair),
            *(*flags, *config.arguments),
        ],
        environment,
        folder / "server.log",
        say,
        stages=_STAGES,
    )
