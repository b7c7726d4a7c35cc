"""What a run is made of, wherever it lives: in this process, or in actors of a cluster.

The loop in `train` sees an engine, a trainer and environments. `LocalParts` makes them here;
`tir_alp.cluster` makes the same in other processes, on this machine or on many.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

import gymnasium

from tir_alp.batch import Sample
from tir_alp.checkpoint import Position
from tir_alp.config import Config
from tir_alp.engines.base import Engine
from tir_alp.engines.transformers import TransformersEngine
from tir_alp.environment import make_environment
from tir_alp.learner import Learner
from tir_alp.policy import load_policy
from tir_alp.rollout_queue import QueueState
from tir_alp.run_folder import RunFolder


class PartLost(RuntimeError):
    """A part of the run died, or was ended because it did not answer."""


class TrainerPart(Protocol):
    """The trainer of a run; see `Learner`. Its calls block."""

    def step(self, groups: Sequence[Sequence[Sample]], step: int) -> dict[str, float]:
        """Make the updates of one step."""
        ...

    def weights(self) -> Any:
        """The policy, as the engine of the same parts takes it: tensors, or a handle to them."""
        ...

    def save(self, folder: Path, position: Position, rollouts: QueueState, keep: int) -> Path:
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

    async def engine(self, path: str, version: int) -> Engine:
        """An engine with the weights in the folder `path`. Close it."""
        ...

    async def trainer(self, run: Path, initial: str, found: Path | None) -> TrainerPart:
        """A trainer; the arguments are the run's folder and those of `Learner`."""
        ...

    def make_env(self) -> gymnasium.Env[str, str]:
        """An environment, for a thread to block in."""
        ...


class LocalParts:
    """All in this process."""

    def __init__(self, config: Config) -> None:
        self._config = config

    async def engine(self, path: str, version: int) -> Engine:
        """As `Parts.engine`."""
        return make_engine(self._config, path, version)

    async def trainer(self, run: Path, initial: str, found: Path | None) -> TrainerPart:
        """As `Parts.trainer`."""
        learner = make_learner(self._config, run, initial, found)
        if (size := learner.ranks.size) > 1:
            learner.close()
            raise ValueError(
                f"a run is one process, but this is one of {size} ranks: start it without "
                "torch.distributed.run, and with --cluster and --cluster.trainer.count"
            )
        return learner

    def make_env(self) -> gymnasium.Env[str, str]:
        """As `Parts.make_env`."""
        return make_environment(self._config.env)


@asynccontextmanager
async def open_parts(config: Config) -> AsyncIterator[Parts]:
    """Here, or on the cluster that the config names.

    Raises:
        ValueError: If there is no such cluster, or it is too small.
    """
    if not config.cluster.is_used:
        yield LocalParts(config)
        return
    try:
        from tir_alp.cluster.cluster import open_cluster
    except ImportError as error:
        raise ValueError(f"{error}; a cluster needs: pip install 'tir_alp[ray]'") from error
    async with open_cluster(config) as cluster:
        yield cluster


def make_engine(config: Config, path: str, version: int) -> Engine:
    """The engine that the config asks for, in this process."""
    return TransformersEngine(
        load_policy(path),
        max_cache_tokens=config.engine.max_cache_tokens,
        version=version,
        precision=config.engine.precision,
        logit_noise=config.engine.logit_noise,
        on_update=config.rollout.on_update,
    )


def make_learner(config: Config, run: Path, initial: str, found: Path | None) -> Learner:
    """The trainer that the config asks for, in this process."""
    on_bad_update = RunFolder(run).dump_bad_update
    return Learner(config, initial=initial, found=found, on_bad_update=on_bad_update)
