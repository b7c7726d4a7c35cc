"""What the loop asks of a trainer, engines and environments, wherever they live."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Protocol

import gymnasium

from tir_alp.engines.base import AskTrainer, Engine, LogprobSource, Probe
from tir_alp.rollouts.renderer import Renderer
from tir_alp.training.batch import Sample
from tir_alp.training.checkpoint import Position
from tir_alp.training.step_report import StepReport


class RoleLost(RuntimeError):
    """A part of the run died, or was ended because it did not answer."""


class TrainerRole(LogprobSource, Protocol):
    """The trainer of a run; see `LocalTrainer`. Its calls block."""

    def step(self, groups: Sequence[Sequence[Sample]], step: int) -> StepReport:
        """Make the updates of one step."""
        ...

    def weights(self) -> Any:
        """The policy, as the engine of the same parts takes it: tensors, or a handle to them."""
        ...

    def save(
        self,
        folder: Path,
        position: Position,
        rollouts: Mapping[str, Any],
        keep: int,
        end_token_ids: frozenset[int] = frozenset(),
    ) -> Path:
        """Write a checkpoint."""
        ...

    def load(self, path: Path) -> None:
        """Take up a checkpoint."""
        ...

    def close(self) -> None:
        """Free what is held."""
        ...


class Placement(Protocol):
    """Makes the parts of a run."""

    def engine(
        self, path: str, version: int, renderer: Renderer, ask_trainer: AskTrainer
    ) -> AbstractAsyncContextManager[Engine]:
        """An engine with the weights in the folder `path`, for as long as the block runs.

        Args:
            path: Of the first weights.
            version: Their version.
            renderer: Of the run: its rule ends completions.
            ask_trainer: What the engine's logprobs can be held against.
        """
        ...

    async def trainer(self, run: Path, initial: str, found: Path | None) -> TrainerRole:
        """A trainer; the arguments are the run's folder and those of `LocalTrainer`."""
        ...

    def make_env(self) -> gymnasium.Env[str, str]:
        """An environment, for a thread to block in."""
        ...


def ask_trainer_in(trainer: TrainerRole, thread: ThreadPoolExecutor) -> AskTrainer:
    """What engines are checked against, computed in the trainer's thread."""

    async def ask_trainer(token_ids: tuple[int, ...]) -> Probe:
        call = (trainer.completion_logprobs, token_ids[:1], token_ids[1:], 1.0, 1.0)
        logprobs = await asyncio.get_running_loop().run_in_executor(thread, *call)
        return Probe(token_ids, tuple(logprobs))

    return ask_trainer
