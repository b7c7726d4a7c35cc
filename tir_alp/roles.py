"""What the loop asks of a trainer, engines and environments, wherever they live."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import gymnasium

from tir_alp.engines.base import AskTrainer, Engine, LogprobSource, Probe
from tir_alp.rollouts.renderer import Renderer
from tir_alp.training.checkpoint_folder import Position
from tir_alp.training.step_report import StepReport
from tir_alp.types import Sample


class RoleLost(RuntimeError):
    """A role died, or was ended because it did not answer."""


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of a cluster, and what a run has placed on it."""

    name: str
    memory: int | None
    """Bytes that the cluster counts as usable for all actors there; None: it does not know."""
    num_cpus: int
    actors: Mapping[str, int]
    """Number of the run's actors there, by kind; see `ClusterConfig.actors`."""


class TrainerRole(LogprobSource, Protocol):
    """The trainer of a run; see `LocalTrainer`. Its calls block."""

    def step(self, groups: Sequence[Sequence[Sample]], step: int) -> StepReport:
        """Make the updates of one step."""
        ...

    def mean_loss(self, samples: Sequence[Sample]) -> float:
        """Mean negative logprob of the loss tokens of some samples, in nats per token."""
        ...

    def weights(self) -> Any:
        """The policy as an engine of the same placement takes it: tensors, or a handle to them."""
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
        """Load a checkpoint."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


class Placement(Protocol):
    """Makes the roles of a run."""

    def engine(
        self, path: str, version: int, renderer: Renderer, ask_trainer: AskTrainer | None
    ) -> AbstractAsyncContextManager[Engine]:
        """Open an engine with the weights in the folder `path`, while the block runs.

        Args:
            path: Folder or Hugging Face id of the first weights.
            version: Their policy version.
            renderer: The run's renderer, whose stop rule ends completions.
            ask_trainer: Gives the trainer's logprobs, against which the engine's are verified.
        """
        ...

    async def trainer(self, run: Path, initial: str, found: Path | None) -> TrainerRole:
        """Start a trainer; `run` is the run's folder, for the rest see `LocalTrainer`."""
        ...

    def make_env(self) -> gymnasium.Env[str, str]:
        """Make an environment; its calls block, so they belong in a thread."""
        ...

    def nodes(self) -> Sequence[Node]:
        """The machines of the run's actors; none if all of them are on this one."""
        ...


def ask_trainer_in(trainer: TrainerRole, thread: ThreadPoolExecutor) -> AskTrainer:
    """Return a function that computes the trainer's logprobs of a sequence, in its thread."""

    async def ask_trainer(token_ids: tuple[int, ...]) -> Probe:
        call = (trainer.completion_logprobs, token_ids[:1], token_ids[1:], 1.0, 1.0)
        logprobs = await asyncio.get_running_loop().run_in_executor(thread, *call)
        return Probe(token_ids, tuple(logprobs))

    return ask_trainer
