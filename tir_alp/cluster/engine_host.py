"""What lives in an engine's actor: an engine, and the rule that ends its completions."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tir_alp.cluster.packed_weights import unpack
from tir_alp.cluster.same_code import Host
from tir_alp.config import Config
from tir_alp.engines.base import Completion, Probe, Sampling
from tir_alp.engines.open import open_engine
from tir_alp.rollouts.renderer import Renderer


class EngineHost(Host):
    """One engine. Its methods run in one event loop; a heartbeat waits for it as they do."""

    async def start(self, config: Config, path: str, version: int, renderer: Renderer) -> None:
        """Load the model, or start its server; `renderer` has the rule that ends completions."""
        self._renderer = renderer
        self._exit = contextlib.AsyncExitStack()
        self._said: list[str] = []
        self._probe: Probe | None = None
        opened = open_engine(config, path, version, self._reference, self._said.append)
        self._engine = await self._exit.enter_async_context(opened)

    async def stop(self) -> None:
        """End the engine, and its server."""
        await self._exit.aclose()

    async def generate(
        self, token_ids: tuple[int, ...], sampling: Sampling, has_rule: bool
    ) -> Completion:
        """As `Engine.generate`; with `has_rule`, the run's own rule ends the completion."""
        if has_rule:
            sampling = replace(sampling, stop_matcher=self._renderer.stop_matcher)
        return await self._engine.generate(token_ids, sampling)

    async def load_weights(
        self, source: Any, version: int, probe: Probe | None
    ) -> Mapping[str, Any]:
        """As `Engine.load_weights`, from what `weights.pack` made or from a folder.

        Args:
            source: The weights.
            version: Theirs.
            probe: What the trainer says with them of a sequence; None: it was not asked.

        Returns:
            What a heartbeat says behind it.
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

    async def _reference(self, _: tuple[int, ...]) -> Probe | None:
        """The trainer is not to be asked from here: what it said comes with the weights."""
        return self._probe

    async def heartbeat(self) -> Mapping[str, Any]:
        """As `Engine.health`, the number of the process, and what its servers had to say since."""
        said, self._said[:] = (*self._said,), ()
        return {**self._engine.health(), "pid": os.getpid(), "said": said}
