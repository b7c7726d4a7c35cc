"""What lives in an engine's actor: an engine, and the rule that ends its completions."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tir_alp.cluster.weights import unpack
from tir_alp.config import Config
from tir_alp.engines.base import Completion, Sampling
from tir_alp.parts import make_engine
from tir_alp.policy import load_tokenizer
from tir_alp.renderer import Renderer


class EngineHost:
    """One engine. Its methods run in one event loop; a heartbeat waits for it as they do."""

    async def start(self, config: Config, path: str, version: int) -> None:
        """Load the model."""
        loop = asyncio.get_running_loop()
        self._engine = await loop.run_in_executor(None, make_engine, config, path, version)
        self._renderer = Renderer(
            load_tokenizer(path),
            system=config.model.system,
            max_observation_tokens=config.rollout.max_observation_tokens,
        )

    async def generate(
        self, token_ids: tuple[int, ...], sampling: Sampling, stops_at_fence: bool
    ) -> Completion:
        """As `Engine.generate`; a stop rule cannot travel, so that it is made here."""
        if stops_at_fence:
            sampling = replace(sampling, stop_matcher=self._renderer.fence_matcher)
        return await self._engine.generate(token_ids, sampling)

    async def load_weights(self, source: Any, version: int) -> None:
        """As `Engine.load_weights`, from what `weights.pack` made or from a folder."""
        weights = source if isinstance(source, Path) else unpack(source)
        await self._engine.load_weights(weights, version)

    async def abort(self, sequence_uid: int | None) -> None:
        """As `Engine.abort`."""
        await self._engine.abort(sequence_uid)

    async def heartbeat(self) -> Mapping[str, float]:
        """As `Engine.health`, and the number of the process."""
        return {**self._engine.health(), "pid": os.getpid()}
