"""The embedded engine: continuous batching in this process over a Hugging Face causal LM.

Requests join and leave the running batch at any token. One coroutine schedules; the forwards run in
a thread of their own, so that the event loop goes on. It is the default for small models and for
tests, and has no paging. The keys and values of a sequence stay in the cache until their room is
needed, so that the sequence's next turn is read from where the last one ended. A long beginning
that several sequences have in common is read and held once.

It can be made to disagree with the trainer on purpose, by the precision of its weights or by noise
on its logits. Its logprobs are always those of the distribution that it samples from.

Invariant: a token is sampled by one version of the weights, which has also read all tokens before
it. What happens to running completions when new weights arrive is the engine's `on_update`:

* `wait`: the weights wait until the completions have ended, and no request is admitted meanwhile;
* `keep`: the completions go on. The new weights read again what they have so far, and their version
  spans record which version sampled which tokens;
* `drop`: the completions begin again with the same draws as before, so that being long does not
  make a completion more likely to be rejected: where old and new weights agree, it is the same.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from tir_alp.config import LoraConfig, TransformersConfig
from tir_alp.engines.adapters import adapter_tensors
from tir_alp.engines.base import (
    Completion,
    EngineContext,
    EngineFailed,
    Sampling,
    check_fit,
    check_request,
)
from tir_alp.engines.embedded.forward import CachedForward
from tir_alp.engines.embedded.kv_cache import KVCache
from tir_alp.engines.embedded.own_caches import OwnCacheForward, OwnCaches, measure_reading
from tir_alp.engines.embedded.parked import ParkedSequences
from tir_alp.engines.embedded.prefix import Prefix, find_prefix, num_held
from tir_alp.engines.embedded.request import EmbeddedRequest, ParkedSequence
from tir_alp.engines.embedded.sampling import draws
from tir_alp.training.arrangement import is_packed
from tir_alp.training.compute_threads import release_threads
from tir_alp.training.policy import compute_device, load_policy
from tir_alp.types import StopReason

_MAX_PREFILL_TOKENS = 8192  # of the requests that join in one step, padding included


@dataclass(frozen=True, slots=True)
class _PendingWeights:
    """Weights that wait to be loaded."""

    tensors: Mapping[str, Tensor]
    version: int
    loaded: asyncio.Future[None]


class TransformersEngine:
    """Samples with a model in this process.

    Args:
        model: A causal LM loaded by `load_policy`. The engine owns it and writes new weights into
            it.
        max_cache_tokens: Bound of the cache: rows times width, plus prefixes, plus what is kept of
            sequences that may go on. Requests wait for room; what is kept gives way to them.
        version: Policy version of the model's weights.
        precision: "float32", "bfloat16", "float16", or "int8" and "fp8" for the matrices of the
            decoder layers; see `TransformersConfig`.
        logit_noise: Standard deviation of noise on the logits.
        on_update: What new weights do to running completions: "wait", "keep" or "drop".
        adapters: Rank and scale of the adapters that it gets in place of weights.
    """

    def __init__(
        self,
        model: Any,
        *,
        max_cache_tokens: int,
        version: int = 0,
        precision: str = "float32",
        logit_noise: float = 0.0,
        on_update: str = "wait",
        adapters: LoraConfig | None = None,
    ) -> None:
        self._on_update, self._adapters = on_update, adapters
        self._first_adapters: Mapping[str, Tensor] | None = None
        self._max_cache_tokens = max_cache_tokens
        self._version = version
        self._cache: KVCache | OwnCaches
        if is_packed(model):
            self._cache = KVCache(max_cache_tokens)
            self._forward = CachedForward(model, self._cache, precision, logit_noise)
        else:
            self._cache = OwnCaches(model, measure_reading(model))
            self._forward = OwnCacheForward(model, self._cache, precision, logit_noise)
        self._parked = ParkedSequences()
        self._waiting: deque[EmbeddedRequest] = deque()
        self._running: list[EmbeddedRequest] = []  # in the order of the cache's rows
        self._pending_weights: _PendingWeights | None = None
        self._work = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._scheduler: asyncio.Task[None] | None = None
        self._tokens_generated = self._tokens_dropped = self._tensors_compared = 0

    async def generate(self, token_ids: tuple[int, ...], sampling: Sampling) -> Completion:
        """Continue a sequence; see `Engine.generate`.

        Raises:
            ValueError: If the sequence is empty, or can never fit into the cache.
        """
        check_request(token_ids, sampling)
        request = EmbeddedRequest(
            prompt=token_ids,
            sampling=sampling,
            uniforms=draws(
                sampling.seed, sampling.sequence_uid, len(token_ids), sampling.max_tokens
            ),
            done=asyncio.get_running_loop().create_future(),
        )
        if request.most_tokens > self._max_cache_tokens:
            raise ValueError(
                f"a sequence of {len(token_ids)} tokens with {sampling.max_tokens} to sample does "
                f"not fit into the engine's cache of {self._max_cache_tokens} tokens; raise "
                "engine.max_cache_tokens or lower rollout.max_turn_tokens"
            )
        self._waiting.append(request)
        self._wake()
        try:
            return await request.done
        finally:
            if request.stop_reason is None:  # the caller gave up: a deadline, or the run's end
                request.stop_reason = StopReason.ABORT
                self._wake()

    async def load_weights(self, source: Mapping[str, Tensor] | Path, version: int) -> None:
        """Take new weights, as soon as `on_update` admits them.

        Raises:
            ValueError: If names or shapes are not those of the engine's model; nothing is changed.
            EngineFailed: If the model differs from the weights afterwards, or the engine is closed.
        """
        new = self._read(source)
        own = self._forward.model.state_dict() if self._adapters is None else self._first_adapters
        check_fit(new if own is None else own, new, version)
        while (earlier := self._pending_weights) is not None:
            await asyncio.wait((earlier.loaded,))  # whether it fails concerns its own caller
            if earlier.loaded.cancelled():
                raise EngineFailed("the engine was closed before it took the new weights")
        loaded = asyncio.get_running_loop().create_future()
        self._pending_weights = _PendingWeights(new, version, loaded)
        self._wake()
        await asyncio.shield(loaded)

    def _read(self, source: Mapping[str, Tensor] | Path) -> Mapping[str, Tensor]:
        if self._adapters is not None:
            return adapter_tensors(source)
        return load_policy(str(source)).state_dict() if isinstance(source, Path) else source

    async def lend_memory(self) -> None:
        """Do nothing: this engine keeps its memory."""

    async def abort(self, sequence_uid: int | None = None) -> None:
        """End the completions of one sequence, or all; each returns the tokens that it has."""
        for request in (*self._waiting, *self._running):
            if sequence_uid in (None, request.sampling.sequence_uid):
                request.stop_reason = StopReason.ABORT
        self._wake()

    def health(self) -> Mapping[str, float]:
        """Requests, cache in use, tokens generated and tokens dropped for new weights.

        `tensors_compared` is the number of tensors that the last update compared with their source.
        """
        return {
            "running": len(self._running),
            "waiting": len(self._waiting),
            "cache_tokens": sum(self._cache.lengths) + self._cache.num_shared,
            "parked_tokens": self._parked.num_tokens,
            "tokens_generated": self._tokens_generated,
            "tokens_dropped": self._tokens_dropped,
            "tensors_compared": self._tensors_compared,
        }

    async def close(self) -> None:
        """Stop, and cancel what still runs."""
        if self._scheduler is not None:
            self._scheduler.cancel()
            await asyncio.gather(self._scheduler, return_exceptions=True)
        for request in (*self._waiting, *self._running):
            request.done.cancel()
        if self._pending_weights is not None:
            self._pending_weights.loaded.cancel()
        self._thread.shutdown()

    def _wake(self) -> None:
        self._work.set()
        if self._scheduler is None:
            self._scheduler = asyncio.get_running_loop().create_task(self._schedule())

    async def _schedule(self) -> None:
        """Consumes waiting requests and pending weights; produces completions; never ends."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                self._work.clear()  # before looking, so that what comes meanwhile is not missed
                self._retire()
                if self._pending_weights is not None and self._on_update != "wait":
                    self._put_back()
                if self._pending_weights is not None and not self._running:
                    await self._take_weights(self._pending_weights)
                num_joining = self._admit()
                if self._running:
                    await loop.run_in_executor(self._thread, self._step, num_joining)
                else:
                    await loop.run_in_executor(self._thread, release_threads)
                    await self._work.wait()
            except Exception as error:
                self._fail(error)

    def _admit(self) -> int:
        """Admit waiting requests, in order, within the cache's budget and one prefill.

        Returns how many joined; they are the last ones of `_running`.
        """
        if not self._waiting:
            return 0
        widest = max((request.most_own for request in self._running), default=0)
        num_joining = longest = 0
        while self._waiting and self._pending_weights is None:
            request = self._waiting[0]
            self._find_cached(request)
            widest = max(widest, request.most_own)
            prefixes = _prefixes_of((*self._running, request))
            num_rows = len(self._running) + 1
            longest = max(longest, request.num_unread)
            num_read = (num_joining + 1) * longest
            num_read += sum(len(each) for each in prefixes if each.stack is None)
            num_tokens = num_rows * widest + num_held(prefixes)
            is_too_much = num_joining and num_read > _MAX_PREFILL_TOKENS
            if is_too_much or num_tokens > self._max_cache_tokens:
                self._parked.take_back(request)
                break
            self._running.append(self._waiting.popleft())
            request.admit()
            self._make_room(num_rows, widest)
            num_joining += 1
        if num_joining:
            self._cache.num_shared = self._count_shared()
        return num_joining

    def _find_cached(self, request: EmbeddedRequest) -> None:
        """Find what the cache holds of a request that may join, or will hold for several."""
        self._parked.hand_over(request)
        if request.parked is None and self._cache.shares_prefixes:
            others = (other.prompt for other in islice(self._waiting, 1, None))
            request.prefix = find_prefix(request.tokens, self._prefixes(), others)

    def _prefixes(self) -> list[Prefix]:
        return _prefixes_of((*self._running, *self._parked))

    def _count_shared(self) -> int:
        return num_held(self._prefixes())

    def _make_room(self, num_rows: int, width: int) -> None:
        """Let go of parked sequences until rows of this number and width have room."""
        while self._parked:
            num_shared = self._count_shared()
            rest = self._max_cache_tokens - num_shared - self._parked.num_tokens
            if self._cache.size_for(num_rows, width, num_shared) <= rest:
                break
            self._parked.drop_oldest()

    def _put_back(self) -> None:
        """Put the running completions first in the queue, for the new weights to read again."""
        for request in self._running:
            if self._on_update == "drop":
                self._tokens_dropped += len(request.token_ids)
                request.begin()
            request.prefix = None
            request.wait()
        self._waiting.extendleft(reversed(self._running))
        self._running.clear()
        self._cache.clear()

    def _park(self, row: int) -> None:
        """Keep the cached keys and values of a completion that has ended."""
        request, cache = self._running[row], self._cache
        uid = request.sampling.sequence_uid
        self._parked.drop(uid)
        held = self._parked.num_tokens + self._count_shared() + cache.size
        if held + cache.lengths[row] <= self._max_cache_tokens:
            token_ids = request.tokens[: cache.num_cached(row)]
            self._parked.put(uid, ParkedSequence(token_ids, request.prefix, cache.copy_row(row)))

    def _forget(self) -> None:
        """Empty the cache: its keys and values are of weights that the engine no longer has."""
        self._cache.clear()
        self._parked.clear()

    def _retire(self) -> None:
        """Answer the requests that have ended, and free their rows."""
        for request in [request for request in self._waiting if request.stop_reason is not None]:
            self._waiting.remove(request)
            self._answer(request)
        for row in reversed(range(len(self._running))):
            if self._running[row].stop_reason is not None:
                if (routing := self._cache.routing(row)) is not None:
                    self._running[row].routing = routing.cpu().numpy().copy()
                if self._running[row].stop_reason is not StopReason.ABORT:
                    self._park(row)
                self._cache.remove_row(row)
                self._answer(self._running[row])
                self._running[row] = self._running[-1]
                self._running.pop()

    def _answer(self, request: EmbeddedRequest) -> None:
        if not request.done.done():
            request.done.set_result(request.completion(self._version))

    def _fail(self, error: Exception) -> None:
        """Fail all requests after a failed forward, and empty the cache."""
        for request in (*self._running, *self._waiting):
            if not request.done.done():
                request.done.set_exception(error)
            request.stop_reason = StopReason.ABORT
        self._running.clear()
        self._waiting.clear()
        self._forget()

    async def _take_weights(self, pending: _PendingWeights) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._thread, self._copy_weights, pending.tensors)
        except Exception as error:
            pending.loaded.set_exception(error)
        else:
            self._version = pending.version
            pending.loaded.set_result(None)
        finally:
            self._forget()
        self._pending_weights = None

    # ------------------------------------------------------------ in the engine's own thread

    def _copy_weights(self, source: Mapping[str, Tensor]) -> None:
        if self._adapters is None:
            self._tensors_compared = self._forward.copy_weights(source)
            return
        scale = self._adapters.alpha / self._adapters.rank
        self._tensors_compared = self._forward.copy_adapters(source, scale)
        shapes = {name: each.to("meta") for name, each in source.items()}
        self._first_adapters = self._first_adapters or shapes

    def _step(self, num_joining: int) -> None:
        """Sample one token for every running request."""
        self._tokens_generated += self._forward.step(self._running, num_joining, self._version)


def _prefixes_of(users: Iterable[EmbeddedRequest | ParkedSequence]) -> list[Prefix]:
    """Return the prefixes in use by some sequences, each once, in a fixed order."""
    return list(dict.fromkeys(each.prefix for each in users if each.prefix is not None))


@asynccontextmanager
async def open_transformers(
    config: TransformersConfig, context: EngineContext
) -> AsyncIterator[TransformersEngine]:
    """Open the embedded engine, on the trainer's device; an `EngineFactory`."""
    model = load_policy(context.path, compute_device(context.device))
    engine = TransformersEngine(
        model,
        max_cache_tokens=config.max_cache_tokens,
        version=context.version,
        precision=config.precision,
        logit_noise=config.logit_noise,
        on_update=context.on_update,
        adapters=context.adapters,
    )
    release_threads()
    try:
        yield engine
    finally:
        await engine.close()
