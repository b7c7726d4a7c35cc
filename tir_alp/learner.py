"""The trainer of a run as its loop sees it: made from the config, saved, and taken back.

It can live in the loop's own process or in another one: what goes in and out can be pickled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from tir_alp import checkpoint
from tir_alp.batch import Sample
from tir_alp.checkpoint import Position
from tir_alp.config import AlgorithmConfig, Config
from tir_alp.parallel import Ranks, join
from tir_alp.policy import load_policy, load_tokenizer
from tir_alp.rollout_queue import QueueState
from tir_alp.trainer import OnBadUpdate, Trainer


class Learner:
    """A trainer, its tokenizer and its checkpoints.

    Of several ranks, each has one, and calls go to all. Close it.

    Args:
        config: Of the run.
        initial: The model that the run began with.
        found: The checkpoint to go on from; None: a new run.
        on_bad_update: See `Trainer`.
    """

    def __init__(
        self, config: Config, *, initial: str, found: Path | None, on_bad_update: OnBadUpdate
    ) -> None:
        path = initial if found is None else str(found)
        self._tokenizer = load_tokenizer(path)
        self._exit = contextlib.ExitStack()
        self._trainer = Trainer(
            load_policy(path if config.trainer.lora is None else initial),
            config.trainer,
            with_run_seed(config),
            ranks=self._exit.enter_context(join(config.trainer.rank_timeout_s)),
            reference=load_policy(initial) if config.algorithm.needs_reference else None,
            temperature=config.rollout.temperature,
            on_bad_update=on_bad_update,
        )
        if found is not None:
            checkpoint.load(found, self._trainer)

    @property
    def ranks(self) -> Ranks:
        """Who trains."""
        return self._trainer.ranks

    def step(self, groups: Sequence[Sequence[Sample]], step: int) -> dict[str, float]:
        """As `Trainer.step`."""
        return self._trainer.step(groups, step)

    def weights(self) -> dict[str, Tensor]:
        """As `Trainer.weights`, all of them: what an engine takes."""
        return dict(self._trainer.weights())

    def save(self, folder: Path, position: Position, rollouts: QueueState, keep: int) -> Path:
        """Write a checkpoint; see `checkpoint.save`."""
        return checkpoint.save(folder, self._trainer, self._tokenizer, position, rollouts, keep)

    def load(self, path: Path) -> None:
        """Take up weights, optimizer and sigma of a checkpoint."""
        checkpoint.load(path, self._trainer)

    def close(self) -> None:
        """Part from the other ranks."""
        self._exit.close()


def with_run_seed(config: Config) -> AlgorithmConfig:
    """The run's algorithm, with noise that differs from seed to seed of the run."""
    noise = config.algorithm.perturbation
    if noise is None:
        return config.algorithm
    noise = noise.model_copy(update={"seed": noise.seed + config.seed})
    return config.algorithm.model_copy(update={"perturbation": noise})
