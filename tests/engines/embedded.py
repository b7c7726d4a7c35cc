"""What the tests of the embedded engine share: a model, an engine, requests."""

import asyncio
from collections.abc import Callable
from contextlib import asynccontextmanager
from typing import Any

import torch

from tir_alp.engines.base import Completion, Sampling
from tir_alp.engines.transformers import TransformersEngine
from tir_alp.models.tiny.model import make_model
from tir_alp.training.attention import PackedSequences
from tir_alp.training.policy import hidden_states, token_logprobs

torch.set_num_threads(1)

PROMPT: tuple[int, ...] = (2, 45, 78, 33, 1, 3)


def model(seed: int = 0) -> Any:
    """The tiny model with larger random weights, which prefer some tokens to others.

    In float64: neighbours change the last bits of a forward, and in float32 those are enough to
    move a draw that lies at the border of two tokens from one to the other.
    """
    return enlarged(make_model(seed)).double()


def enlarged(small: Any) -> Any:
    with torch.no_grad():  # fresh weights give every token the same logits
        for parameter in small.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return small.eval()


@asynccontextmanager
async def opened(of: Any = None, max_cache_tokens: int = 1 << 16, **settings: Any):
    engine = TransformersEngine(
        model() if of is None else of, max_cache_tokens=max_cache_tokens, **settings
    )
    try:
        yield engine
    finally:
        await engine.close()


def sampled(*requests: tuple[tuple[int, ...], Sampling], **settings) -> list[Completion]:
    """The completions by a new engine of requests that arrive together."""

    async def run() -> list[Completion]:
        async with opened(**settings) as engine:
            return await asyncio.gather(*(engine.generate(*request) for request in requests))

    return asyncio.run(run())


def one(sampling: Sampling, prompt: tuple[int, ...] = PROMPT, **settings) -> Completion:
    return sampled((prompt, sampling), **settings)[0]


def trainer_logprobs(
    of: Any, prompt: tuple[int, ...], completion: Completion, temperature: float = 1.0
) -> torch.Tensor:
    """The logprobs of a completion in one forward of the trainer's kind."""
    ids = torch.tensor(prompt + completion.token_ids)
    with torch.no_grad():
        layout = PackedSequences((len(ids),))
        hidden = hidden_states(of, ids, torch.arange(len(ids)), layout)
        start = len(prompt)
        return token_logprobs(of, hidden[start - 1 : -1], ids[start:], temperature=temperature)[0]


class Watch:
    """A stop rule that never holds, but reports every token to the event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.tokens: list[int] = []
        self.began = asyncio.Event()
        self.seen: Callable[[], None] = lambda: None

    def __call__(self) -> Callable[[int], bool]:
        return self._feed

    def _feed(self, token_id: int) -> bool:
        self.tokens.append(token_id)
        self.seen()
        self._loop.call_soon_threadsafe(self.began.set)
        return False
