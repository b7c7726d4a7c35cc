"""One completion in the making, and what the cache keeps of a sequence between completions."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tir_alp.engines.base import Completion, Sampling
from tir_alp.engines.embedded.prefix import Prefix, States
from tir_alp.types import StopReason, VersionSpan


@dataclass(frozen=True, slots=True)
class ParkedSequence:
    """The keys and values of a sequence whose last completion has ended."""

    token_ids: tuple[int, ...]
    prefix: Prefix | None
    states: States
    """Of the tokens after the prefix."""

    @property
    def num_own(self) -> int:
        """Tokens that no other sequence holds."""
        return len(self.token_ids) - (len(self.prefix) if self.prefix else 0)


@dataclass(eq=False, slots=True)
class EmbeddedRequest:
    """One completion in the making."""

    prompt: tuple[int, ...]
    sampling: Sampling
    uniforms: np.ndarray
    """[max_tokens] one draw per token of the completion."""
    matches: Callable[[int], bool] | None = field(init=False)
    """The stop rule; returns True at the last token to keep."""
    done: asyncio.Future[Completion]
    parked: ParkedSequence | None = None
    """What the cache keeps of the prompt; the request's row begins with that."""
    prefix: Prefix | None = None
    """What it has in common with other sequences, and is not in its row."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stop_reason: StopReason | None = None
    versions: list[tuple[int, int]] = field(default_factory=list)
    """Each policy version that sampled some of it, with the index of its first token."""
    routing: NDArray | None = None
    """[K, L, E] experts of the tokens that were read; None: the model has no routers."""
    queue_s: float = 0.0
    """Time in seconds that it waited, before it was admitted last."""
    _waits_since: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Discard all tokens that were sampled so far."""
        matcher = self.sampling.stop_matcher
        self.matches = matcher() if matcher else None
        self.token_ids, self.logprobs, self.versions = [], [], []

    def wait(self) -> None:
        """Begin to wait again, after it was admitted."""
        self._waits_since = time.monotonic()

    def admit(self) -> None:
        """End the wait."""
        self.queue_s += time.monotonic() - self._waits_since

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens so far, the prompt included."""
        return (*self.prompt, *self.token_ids) if self.token_ids else self.prompt

    @property
    def num_tokens(self) -> int:
        """Number of tokens so far, the prompt included."""
        return len(self.prompt) + len(self.token_ids)

    @property
    def num_unread(self) -> int:
        """Tokens that its row has yet to read, if only `parked` and `prefix` are in the cache."""
        if self.parked is not None:
            return self.num_tokens - len(self.parked.token_ids)
        return self.num_tokens - (len(self.prefix) if self.prefix else 0)

    @property
    def most_tokens(self) -> int:
        """Tokens that it can come to have."""
        return len(self.prompt) + self.sampling.max_tokens

    @property
    def most_own(self) -> int:
        """Columns of the cache that its row can come to need."""
        return self.most_tokens - (len(self.prefix) if self.prefix else 0)

    def push(self, token_id: int, logprob: float, version: int) -> None:
        """Add the next sampled token, and decide whether it is the last."""
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
        """Return what was sampled; an empty completion gets `version`."""
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
            routing=self.routing,
            queue_s=self.queue_s,
        )
