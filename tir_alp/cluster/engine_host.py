"""What runs in an engine's actor: an engine, and the rule that ends its completions."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tir_alp.cluster.packed_weights import unpack
from tir_alp.cluster.same_code import ReportsCode
from tir_alp.config import Config
from tir_alp.engines.base import Completion, Probe, Sampling
from tir_alp.engines.open import open_engine
from tir_alp.rollouts.renderer import Renderer


class EngineHost(ReportsCode):
    """One engine. Its methods, the health check included, share one event loop."""

    async def start(self, config: Config, path: str, version: int, renderer: Renderer) -> None:
        """Load the model, or start its server.

        Args:
            config: The config of the run.
            path: Folder or Hugging Face id of the weights.
            version: Policy version of the weights.
            renderer: The renderer of the run, whose rule ends completions.
        """
        self._renderer = renderer
        self._exit = contextlib.AsyncExitStack()
        self._log: list[str] = []
        self._probe: Probe | None = None
        opened = open_engine(config, path, version, self._ask_trainer, self._log.append)
        self._engine = await self._exit.enter_async_context(opened)

    async def stop(self) -> None:
        """End the engine, and its server."""
        await self._exit.aclose()

    async def generate(
        self, token_ids: tuple[int, ...], sampling: Sampling, has_rule: bool
    ) -> Completion:
        """As `Engine.generate`; with `has_rule`, the rule of the run ends the completion."""
        if has_rule:
            sampling = replace(sampling, stop_matcher=self._renderer.stop_matcher)
        return await self._engine.generate(token_ids, sampling)

    async def load_weights(
        self, source: Any, version: int, probe: Probe | None
    ) -> Mapping[str, Any]:
        """As `Engine.load_weights`.

        Args:
            source: The result of `packed_weights.pack`, or a folder.
            version: Policy version of the weights.
            probe: The trainer's logprobs of a sequence with these weights; None: it was not asked.

        Returns:
            The health report after the update.
        """
        self._probe = probe
        weights = source if isinstance(source, Path) else unpack(source)
        await self._engine.load_weights(weights, version)
        return await self.heartbeat()

    async def lend_memory(self) -> None:
        """As `Engine.lend_memory`."""
        await self._engine.lend_memory()

    async def abort(self, sequence_uid: int | None) -> None:
        """As `Engine.abort`."""
        await self._engine.abort(sequence_uid)

    async def _ask_trainer(self, _: tuple[int, ...]) -> Probe | None:
        """Return the probe that came with the weights: the trainer cannot be reached from here."""
        return self._probe

    async def heartbeat(self) -> Mapping[str, Any]:
        """As `Engine.health`, with the process id and the lines logged since the last report."""
        lines, self._log[:] = (*self._log,), ()
        return {**self._engine.health(), "pid": os.getpid(), "log": lines}
