"""The trainer of a run as its loop sees it: made from the config, saved, and taken back.

It can live in the loop's own process or in another one: what goes in and out can be pickled.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tir_alp.algorithm.presets import AlgorithmConfig
from tir_alp.config import Config
from tir_alp.records.folder import RunFolder
from tir_alp.records.ledger_rows import Row, update_row
from tir_alp.training import checkpoint
from tir_alp.training.batch import Sample
from tir_alp.training.checkpoint import Position
from tir_alp.training.policy import compute_device, load_policy, load_tokenizer
from tir_alp.training.ranks import Ranks, join
from tir_alp.training.trainer import OnBadUpdate, Trainer
from tir_alp.types import Batch


class LocalTrainer:
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
        self._updates: list[Row] = []
        self._takes_turns = config.engine.returns_memory
        device = compute_device(config.trainer.device)
        self._trainer = Trainer(
            load_policy(path if config.trainer.lora is None else initial),
            config.trainer,
            with_run_seed(config),
            ranks=self._exit.enter_context(join(config.trainer.rank_timeout_s, device)),
            reference=load_policy(initial) if config.algorithm.needs_reference else None,
            temperature=config.rollout.temperature,
            on_bad_update=on_bad_update,
            on_update=self._note,
        )
        if found is not None:
            checkpoint.load(found, self._trainer)

    @property
    def ranks(self) -> Ranks:
        """Who trains."""
        return self._trainer.ranks

    def step(
        self, groups: Sequence[Sequence[Sample]], step: int
    ) -> tuple[dict[str, float], list[Row]]:
        """As `Trainer.step`; and, for the ledger, what all ranks had packed."""
        self._updates = []
        metrics = self._trainer.step(groups, step)
        return metrics, _joined(self.ranks.gather(self._updates))

    def weights(self) -> dict[str, Tensor]:
        """As `Trainer.weights`, all of them: what an engine takes."""
        weights = dict(self._trainer.weights())
        if self._takes_turns:  # what torch keeps for later is memory that the engine now needs
            torch.cuda.empty_cache()
        return weights

    def completion_logprobs(
        self,
        prompt: Sequence[int],
        completion: Sequence[int],
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> list[float]:
        """As `Trainer.completion_logprobs`."""
        return self._trainer.completion_logprobs(prompt, completion, temperature, top_p)

    def perturb_weights(self, scale: float) -> None:
        """As `Trainer.perturb_weights`."""
        self._trainer.perturb_weights(scale)

    def save(
        self, folder: Path, position: Position, rollouts: Mapping[str, Any], keep: int
    ) -> Path:
        """Write a checkpoint; see `checkpoint.save`."""
        return checkpoint.save(folder, self._trainer, self._tokenizer, position, rollouts, keep)

    def load(self, path: Path) -> None:
        """Take up weights, optimizer and sigma of a checkpoint."""
        checkpoint.load(path, self._trainer)

    def close(self) -> None:
        """Part from the other ranks."""
        self._exit.close()

    def _note(self, update: int, batches: Sequence[Batch], made: bool) -> None:
        self._updates.append(update_row(update, batches, made))


def _joined(of_ranks: Sequence[Sequence[Row]]) -> list[Row]:
    """One row an update. A rank without a sequence of its own packs another's, to no effect."""
    joined: defaultdict[int, Row] = defaultdict(dict)
    for row in (row for rows in of_ranks for row in rows):
        own = [each for each in row["sequences"] if each[2]]  # tokens of the loss
        before = joined[row["update"]].get("sequences", [])
        joined[row["update"]] = {**row, "sequences": [*before, *own]}
    return [joined[update] for update in sorted(joined)]


def with_run_seed(config: Config) -> AlgorithmConfig:
    """The run's algorithm, with noise that differs from seed to seed of the run."""
    noise = config.algorithm.perturbation
    if noise is None:
        return config.algorithm
    noise = noise.model_copy(update={"seed": noise.seed + config.seed})
    return config.algorithm.model_copy(update={"perturbation": noise})


def make_local_trainer(config: Config, run: Path, initial: str, found: Path | None) -> LocalTrainer:
    """The trainer that the config asks for, in this process."""
    on_bad_update = RunFolder(run).dump_bad_update
    return LocalTrainer(config, initial=initial, found=found, on_bad_update=on_bad_update)
