"""What the loop asks of a trainer, engines and environments, wherever they live."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Protocol

import gymnasium

from tir_alp.engines.base import Engine, Judge, Probe, Reference
from tir_alp.records.ledger_rows import Row
from tir_alp.rollouts.renderer import Renderer
from tir_alp.training.batch import Sample
from tir_alp.training.checkpoint import Position


class PartLost(RuntimeError):
    """A part of the run died, or was ended because it did not answer."""


class TrainerPart(Judge, Protocol):
    """The trainer of a run; see `Learner`. Its calls block."""

    def step(
        self, groups: Sequence[Sequence[Sample]], step: int
    ) -> tuple[dict[str, float], list[Row]]:
        """Make the updates of one step; metrics, and rows for the ledger."""
        ...

    def weights(self) -> Any:
        """The policy, as the engine of the same parts takes it: tensors, or a handle to them."""
        ...

    def save(
        self, folder: Path, position: Position, rollouts: Mapping[str, Any], keep: int
    ) -> Path:
        """Write a checkpoint."""
        ...

    def load(self, path: Path) -> None:
        """Take up a checkpoint."""
        ...

    def close(self) -> None:
        """Free what is held."""
        ...


class Parts(Protocol):
    """Makes the parts of a run."""

    def engine(
        self, path: str, version: int, renderer: Renderer, reference: Reference
    ) -> AbstractAsyncContextManager[Engine]:
        """An engine with the weights in the folder `path`, for as long as the block runs.

        Args:
            path: Of the first weights.
            version: Their version.
            renderer: Of the run: its rule ends completions.
            reference: What the engine's logprobs can be held against.
        """
        ...

    async def trainer(self, run: Path, initial: str, found: Path | None) -> TrainerPart:
        """A trainer; the arguments are the run's folder and those of `Learner`."""
        ...

    def make_env(self) -> gymnasium.Env[str, str]:
        """An environment, for a thread to block in."""
        ...


def reference_by(trainer: TrainerPart, thread: ThreadPoolExecutor) -> Reference:
    """What engines are checked against, computed in the trainer's thread."""

    async def reference(token_ids: tuple[int, ...]) -> Probe:
        call = (trainer.completion_logprobs, token_ids[:1], token_ids[1:], 1.0, 1.0)
        logprobs = await asyncio.get_running_loop().run_in_executor(thread, *call)
        return Probe(token_ids, tuple(logprobs))

    return reference
