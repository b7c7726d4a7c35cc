"""The embedded engine, made to draw the tokens of a script; `--engine.factory` of the tests.

The model, the cache and the sampling are the real ones: a forced token is one whose draw was
chosen, and its logprob is that under the model.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import torch

from tir_alp.engines.transformers import TransformersEngine
from tir_alp.training.policy import load_policy
from tir_alp.types import split_uid


class ForcedEngine:
    """Draws the next turn of a script for each sequence.

    Args:
        inner: The engine that computes and samples.
        head: The module that computes its logits.
        scripts: For each sequence, by its uid modulo their number, the tokens of its turns.
    """

    def __init__(self, inner: TransformersEngine, head: Any, scripts: list[list[list[int]]]):
        self._inner, self._scripts = inner, scripts
        self._turns: dict[int, tuple[int, int, tuple[int, ...]]] = {}
        self._forced: list[int] = []
        self._one_at_a_time = asyncio.Lock()
        head.register_forward_hook(self._choose)

    async def generate(self, token_ids: tuple[int, ...], sampling: Any) -> Any:
        """Continue a sequence by the next turn of its script."""
        async with self._one_at_a_time:
            uid, trace = split_uid(sampling.sequence_uid)
            script = self._scripts[uid % len(self._scripts)]
            turn, last_trace, before = self._turns.get(uid, (0, 0, ()))
            goes_on = bool(before) and token_ids[: len(before)] == before
            if not goes_on and trace != last_trace + 1:
                turn = 0  # another conversation: that of a check before the run, say
            self._forced = list(script[turn]) if turn < len(script) else []
            completion = await self._inner.generate(token_ids, sampling)
            self._turns[uid] = turn + 1, trace, token_ids + completion.token_ids
            return completion

    def _choose(self, head: Any, inputs: Any, logits: torch.Tensor) -> None:
        """Choose the draw of the only request, before the engine samples."""
        if not self._forced:
            return
        (request,) = self._inner._running
        weights = torch.softmax(logits[0].float(), -1).double()
        token = self._forced.pop(0)
        below = weights[:token].sum() + weights[token] / 2
        request.uniforms[len(request.token_ids)] = float(below / weights.sum())

    async def load_weights(self, source: Any, version: int) -> None:
        """Take new weights."""
        await self._inner.load_weights(source, version)

    async def lend_memory(self) -> None:
        """Do nothing."""

    async def abort(self, sequence_uid: int | None = None) -> None:
        """End completions."""
        await self._inner.abort(sequence_uid)

    def health(self) -> Any:
        """Return what the engine reports."""
        return self._inner.health()

    async def close(self) -> None:
        """Close the engine."""
        await self._inner.close()


@asynccontextmanager
async def open_engine(settings: Any, context: Any) -> AsyncIterator[ForcedEngine]:
    """Open the engine; `engine.kwargs.scripts` are the scripts."""
    model = load_policy(context.path)
    inner = TransformersEngine(model, max_cache_tokens=65536, version=context.version)
    engine = ForcedEngine(inner, model.get_output_embeddings(), settings.kwargs["scripts"])
    try:
        yield engine
    finally:
        await engine.close()
