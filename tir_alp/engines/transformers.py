"""The embedded engine: continuous batching in this process over a Hugging Face causal LM.

Requests join and leave the running batch at any token. One coroutine schedules; the forwards run in
one thread of their own, so that the event loop goes on. It is the default for small models and for
tests; it has no paging. What it has computed of a sequence stays until there is no room for it, so
that the sequence's next turn is read from where the last one ended.

It can be made to disagree with the trainer on purpose, by the precision of its weights or by noise
on its logits. Its logprobs are those of what it samples from all the same.

Invariant: a token is sampled by one version of the weights, which has also read all tokens before
it. What becomes of the running completions when new weights come is the engine's `on_update`:

* `wait`: the weights wait until they have ended, and nothing is admitted meanwhile;
* `keep`: they go on; what they have so far is read again by the new weights, and their version
  spans say which tokens are whose;
* `drop`: they begin again. They have the same draws as before, so that a completion is not rejected
  for being long: where old and new weights agree it comes out the same.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tir_alp.algorithm.noise import name_hashes, normal, nth_keys
from tir_alp.engines.base import Completion, EngineFailed, Sampling, check_fit, check_request
from tir_alp.engines.embedded.kv_cache import CachedStep, KVCache, RowStates
from tir_alp.engines.embedded.precision import layer_matrices, quantised
from tir_alp.engines.embedded.sampling import draws, sample
from tir_alp.training.policy import hidden_states, load_policy, next_token_logits
from tir_alp.types import StopReason, VersionSpan

_MAX_PREFILL_TOKENS = 8192  # of the requests that join in one step, padding included


@dataclass(frozen=True, slots=True)
class _Parked:
    """The keys and values of a sequence whose last completion has ended."""

    token_ids: tuple[int, ...]
    states: RowStates


@dataclass(eq=False, slots=True)
class _Request:
    """One completion in the making."""

    prompt: tuple[int, ...]
    sampling: Sampling
    uniforms: np.ndarray
    matches: Callable[[int], bool] | None = field(init=False)
    done: asyncio.Future[Completion]
    parked: _Parked | None = None
    """What the cache has of the prompt; its row begins with that."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stop_reason: StopReason | None = None
    versions: list[tuple[int, int]] = field(default_factory=list)
    """Each version that sampled some of it, and its first token."""

    def __post_init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Forget what was sampled, if anything was."""
        matcher = self.sampling.stop_matcher
        self.matches = matcher() if matcher else None
        self.token_ids, self.logprobs, self.versions = [], [], []

    @property
    def num_tokens(self) -> int:
        """Tokens so far, the prompt included."""
        return len(self.prompt) + len(self.token_ids)

    @property
    def num_unread(self) -> int:
        """Tokens so far that have to be computed, where nothing but `parked` is in the cache."""
        return self.num_tokens - (len(self.parked.token_ids) if self.parked else 0)

    @property
    def most_tokens(self) -> int:
        """Columns of the cache that it can come to need."""
        return len(self.prompt) + self.sampling.max_tokens

    def push(self, token_id: int, logprob: float, version: int) -> None:
        """Take the next sampled token, and see whether it is the last."""
        if not self.versions or self.versions[-1][0] != version:
            self.versions.append((version, len(self.token_ids)))
        self.token_ids.append(token_id)
        self.logprobs.append(logprob)
        if token_id in self.sampling.stop_token_ids:
            self.stop_reason = StopReason.EOS
        elif self.matches is not None and self.matches(token_id):
            self.stop_reason = StopReason.STOP
        elif len(self.token_ids) == self.sampling.max_tokens:
            self.stop_reason = StopReason.LENGTH

    def completion(self, version: int) -> Completion:
        """What was sampled; `version` stands for an empty completion."""
        starts = [start for _, start in self.versions]
        stops = [*starts[1:], len(self.token_ids)]
        spans = zip(self.versions, stops, strict=True)
        assert self.stop_reason is not None
        return Completion(
            token_ids=tuple(self.token_ids),
            logprobs=tuple(self.logprobs),
            stop_reason=self.stop_reason,
            policy_version=self.versions[0][0] if self.versions else version,
            version_spans=tuple(VersionSpan(each, start, stop) for (each, start), stop in spans)
            if len(starts) > 1
            else (),
        )


class TransformersEngine:
    """Samples with a model in this process.

    Args:
        model: A causal LM loaded by `load_policy`; the engine keeps it for itself and writes new
            weights into it.
        max_cache_tokens: Bound of the cache: rows times width, and what is kept of sequences that
            may go on. Requests wait for room, the others make it.
        version: Policy version of the model's weights.
        precision: "float32", "bfloat16", or "int8" and "fp8" for the matrices of the decoder
            layers; see `EngineConfig`.
        logit_noise: Standard deviation of noise on the logits.
        on_update: What new weights do to running completions: "wait", "keep" or "drop".
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
    ) -> None:
        self._on_update = on_update
        self._model = model.eval().requires_grad_(False)
        self._precision, self._logit_noise = precision, logit_noise
        if precision == "bfloat16":
            self._model = model.to(torch.bfloat16)
        self._quantised = layer_matrices(model) if precision in ("int8", "fp8") else frozenset()
        self._max_cache_tokens = max_cache_tokens
        self._version = version
        self._cache = KVCache(max_cache_tokens)
        self._parked: OrderedDict[int, _Parked] = OrderedDict()  # by sequence, the oldest first
        self._num_parked = 0  # tokens
        self._waiting: deque[_Request] = deque()
        self._running: list[_Request] = []  # in the order of the cache's rows
        if self._quantised:
            self._copy_weights(model.state_dict())
        self._pending_weights: tuple[Mapping[str, Tensor], int, asyncio.Future[None]] | None = None
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
        request = _Request(
            prompt=token_ids,
            sampling=sampling,
            uniforms=draws(
                sampling.seed, sampling.sequence_uid, len(token_ids), sampling.max_tokens
            ),
            done=asyncio.get_running_loop().create_future(),
        )
        if request.most_tokens > self._max_cache_tokens:
            raise ValueError(
                f"a sequence of {len(token_ids)} tokens with {sampling.max_tokens} to come does "
                f"not fit into the engine's cache of {self._max_cache_tokens} tokens; raise "
                "engine.max_cache_tokens or lower rollout.max_turn_tokens"
            )
        self._waiting.append(request)
        self._wake()
        try:
            return await request.done
        finally:
            if request.stop_reason is None:  # the caller gave up: its deadline, or the run's end
                request.stop_reason = StopReason.ABORT
                self._wake()

    async def load_weights(self, source: Mapping[str, Tensor] | Path, version: int) -> None:
        """Take new weights, as soon as `on_update` lets them in.

        Raises:
            ValueError: If names or shapes are not those of the engine's model; nothing is changed.
        """
        new: Mapping[str, Tensor] = (
            load_policy(str(source)).state_dict() if isinstance(source, Path) else source
        )
        check_fit(self._model.state_dict(), new, version)
        while self._pending_weights is not None:
            await asyncio.shield(self._pending_weights[2])
        loaded = asyncio.get_running_loop().create_future()
        self._pending_weights = (new, version, loaded)
        self._wake()
        await asyncio.shield(loaded)

    async def lend_memory(self) -> None:
        """Nothing: the trainer's device keeps this engine's memory."""

    async def abort(self, sequence_uid: int | None = None) -> None:
        """End the completions of one sequence, or all; they return what they have."""
        for request in (*self._waiting, *self._running):
            if sequence_uid in (None, request.sampling.sequence_uid):
                request.stop_reason = StopReason.ABORT
        self._wake()

    def health(self) -> Mapping[str, float]:
        """Requests and cache in use, tokens made, and dropped for new weights, so far.

        `tensors_compared`: how many the last update found to be what the engine was given.
        """
        return {
            "running": len(self._running),
            "waiting": len(self._waiting),
            "cache_tokens": sum(self._cache.lengths),
            "parked_tokens": self._num_parked,
            "tokens_generated": self._tokens_generated,
            "tokens_dropped": self._tokens_dropped,
            "tensors_compared": self._tensors_compared,
        }

    async def close(self) -> None:
        """Stop; what still runs is cancelled."""
        if self._scheduler is not None:
            self._scheduler.cancel()
            await asyncio.gather(self._scheduler, return_exceptions=True)
        for request in (*self._waiting, *self._running):
            request.done.cancel()
        if self._pending_weights is not None:
            self._pending_weights[2].cancel()
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
                    await self._take_weights(*self._pending_weights)
                num_joining = self._admit()
                if self._running:
                    await loop.run_in_executor(self._thread, self._step, num_joining)
                else:
                    await self._work.wait()
            except Exception as error:
                self._fail(error)

    def _admit(self) -> int:
        """Take waiting requests, in order, as far as the cache's budget and one prefill reach.

        Returns how many joined; they stand behind the others in `_running`.
        """
        widest = max((request.most_tokens for request in self._running), default=0)
        num_joining = longest = 0
        while self._waiting and self._pending_weights is None:
            request = self._waiting[0]
            widest = max(widest, request.most_tokens)
            if (len(self._running) + 1) * widest > self._max_cache_tokens:
                break
            room = self._max_cache_tokens - self._cache.size_for(len(self._running) + 1, widest)
            while self._num_parked > room:
                self._drop(next(iter(self._parked)))
            self._unpark(request)
            longest = max(longest, request.num_unread)
            if num_joining and (num_joining + 1) * longest > _MAX_PREFILL_TOKENS:
                break
            self._running.append(self._waiting.popleft())
            num_joining += 1
        return num_joining

    def _put_back(self) -> None:
        """Let the running completions wait, before all others, for weights that read them anew."""
        for request in self._running:
            if self._on_update == "drop":
                self._tokens_dropped += len(request.token_ids)
                request.begin()
        self._waiting.extendleft(reversed(self._running))
        self._running.clear()
        self._cache.clear()

    def _park(self, row: int) -> None:
        """Keep what is cached of a completion that has ended."""
        request = self._running[row]
        uid, length = request.sampling.sequence_uid, self._cache.lengths[row]
        self._drop(uid)
        if self._num_parked + length <= self._max_cache_tokens - self._cache.size:
            token_ids = (*request.prompt, *request.token_ids)[:length]
            self._parked[uid] = _Parked(token_ids, self._cache.copy_row(row))
            self._num_parked += length

    def _unpark(self, request: _Request) -> None:
        """Take what is kept of a sequence, if it begins this request's prompt, once."""
        parked = self._drop(request.sampling.sequence_uid)
        if parked is None or len(parked.token_ids) >= len(request.prompt):
            return
        if request.prompt[: len(parked.token_ids)] == parked.token_ids:
            request.parked = parked

    def _drop(self, uid: int) -> _Parked | None:
        parked = self._parked.pop(uid, None)
        if parked is not None:
            self._num_parked -= len(parked.token_ids)
        return parked

    def _forget(self) -> None:
        """Empty the cache, e.g. since the weights behind it are no longer the engine's."""
        self._cache.clear()
        self._parked.clear()
        self._num_parked = 0
        for request in self._waiting:
            request.parked = None

    def _retire(self) -> None:
        """Answer the requests that have ended, and free their rows."""
        for request in [request for request in self._waiting if request.stop_reason is not None]:
            self._waiting.remove(request)
            self._answer(request)
        for row in reversed(range(len(self._running))):
            if self._running[row].stop_reason is not None:
                if self._running[row].stop_reason is not StopReason.ABORT:
                    self._park(row)
                self._cache.remove_row(row)
                self._answer(self._running[row])
                self._running[row] = self._running[-1]
                self._running.pop()

    def _answer(self, request: _Request) -> None:
        if not request.done.done():
            request.done.set_result(request.completion(self._version))

    def _fail(self, error: Exception) -> None:
        """A forward failed: nobody waits for what will not come, and the cache starts afresh."""
        for request in (*self._running, *self._waiting):
            if not request.done.done():
                request.done.set_exception(error)
            request.stop_reason = StopReason.ABORT
        self._running.clear()
        self._waiting.clear()
        self._forget()

    async def _take_weights(
        self, source: Mapping[str, Tensor], version: int, loaded: asyncio.Future[None]
    ) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._thread, self._copy_weights, source)
        except Exception as error:
            loaded.set_exception(error)
        else:
            self._version = version
            loaded.set_result(None)
        self._pending_weights = None

    # ------------------------------------------------------------ in the engine's own thread

    @torch.no_grad()
    def _copy_weights(self, source: Mapping[str, Tensor]) -> None:
        own = self._model.state_dict()
        for name, tensor in own.items():
            new = source[name]
            tensor.copy_(quantised(new, self._precision) if name in self._quantised else new)
        self._forget()
        compared = [name for name in own if name not in self._quantised]
        for name in compared:
            if not torch.equal(own[name], source[name].to(own[name])):
                raise EngineFailed(
                    f"the engine does not hold the weights that it was given: {name!r} differs. "
                    "Its numbers are not finite, or its model has it tied to another tensor"
                )
        self._tensors_compared = len(compared)

    @torch.inference_mode()
    def _step(self, num_joining: int) -> None:
        """One token for every running request; those that join begin with all their tokens."""
        first = len(self._running) - num_joining
        if first:
            self._forward(range(first), [r.token_ids[-1:] for r in self._running[:first]])
        if num_joining:
            rows = range(first, len(self._running))
            for row in rows:
                self._cache.add_row()
                if (parked := self._running[row].parked) is not None:
                    self._cache.fill_row(row, parked.states)
                    self._running[row].parked = None
            so_far = [[*self._running[row].prompt, *self._running[row].token_ids] for row in rows]
            lengths = self._cache.lengths[first:]
            self._forward(rows, [ids[n:] for ids, n in zip(so_far, lengths, strict=True)])

    def _forward(self, rows: range, new_tokens: list[list[int]]) -> None:
        device = self._model.device
        step = CachedStep(self._cache, rows, [len(tokens) for tokens in new_tokens], device)
        token_ids = torch.tensor([token for tokens in new_tokens for token in tokens])
        hidden = hidden_states(self._model, token_ids.to(device), step.positions, step)
        step.commit()
        logits = next_token_logits(self._model, hidden[step.last]).cpu()
        requests = [self._running[row] for row in rows]
        if self._logit_noise > 0:
            streams = name_hashes(
                f"logits/{request.sampling.seed}/{request.sampling.sequence_uid}"
                for request in requests
            )
            positions = torch.tensor([request.num_tokens for request in requests])
            noise = normal(nth_keys(streams, positions), logits.shape[1])
            logits = logits + self._logit_noise * noise
        sampled, logprobs = sample(
            logits,
            torch.tensor([request.sampling.temperature for request in requests]),
            torch.tensor([request.sampling.top_p for request in requests]),
            torch.tensor([request.uniforms[len(request.token_ids)] for request in requests]),
        )
        for request, token_id, logprob in zip(
            requests, sampled.tolist(), logprobs.tolist(), strict=True
        ):
            if request.stop_reason is None:  # else it was aborted while this forward ran
                request.push(token_id, logprob, self._version)
        self._tokens_generated += len(requests)
