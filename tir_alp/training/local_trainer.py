"""The trainer of a run in this process: made from the config, saved and loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tir_alp.algorithm.presets import AlgorithmConfig
from tir_alp.config import Config
from tir_alp.training import checkpoint
from tir_alp.training.checkpoint_folder import Position
from tir_alp.training.compute_threads import releasing
from tir_alp.training.policy import compute_device, load_policy, load_tokenizer
from tir_alp.training.ranks import Ranks, join
from tir_alp.training.step_report import StepReport
from tir_alp.training.trainer import OnBadUpdate, Trainer
from tir_alp.types import Sample


class LocalTrainer:
    """A trainer with its tokenizer and its checkpoints. It must be closed.

    Arguments and results of its methods can be pickled. With several ranks, each rank has a
    `LocalTrainer`, and every method is called on all of them.

    Args:
        config: The config of the run.
        initial: Folder or Hugging Face id of the model that the run began with.
        found: Folder of the checkpoint to resume from; None: a new run.
        on_bad_update: See `Trainer`.
    """

    @releasing
    def __init__(
        self, config: Config, *, initial: str, found: Path | None, on_bad_update: OnBadUpdate
    ) -> None:
        path = initial if found is None else str(found)
        self._tokenizer = load_tokenizer(path)
        self._takes_turns = config.engine.returns_memory
        self._sends_adapters = config.adapters is not None
        device = compute_device(config.trainer.device)
        with contextlib.ExitStack() as stack:
            self._trainer = Trainer(
                load_policy(path if config.trainer.lora is None else initial),
                config.trainer,
                with_run_seed(config),
                ranks=stack.enter_context(join(config.trainer.rank_timeout_s, device)),
                reference=load_policy(initial) if config.algorithm.needs_reference else None,
                temperature=config.rollout.temperature,
                on_bad_update=on_bad_update,
                num_steps=config.steps,
                clean_every=config.metrics.clean_every,
                num_kept_versions=config.num_kept_versions,
                max_token_values=config.records.max_token_values,
            )
            if found is not None:
                checkpoint.load(found, self._trainer)
            self._exit = stack.pop_all()

    @property
    def ranks(self) -> Ranks:
        """The ranks that train together."""
        return self._trainer.ranks

    @releasing
    def step(self, groups: Sequence[Sequence[Sample]], step: int) -> StepReport:
        """As `Trainer.step`."""
        return self._trainer.step(groups, step)

    @releasing
    def mean_loss(self, samples: Sequence[Sample]) -> float:
        """As `Trainer.mean_loss`."""
        return self._trainer.mean_loss(samples)

    @releasing
    def weights(self) -> dict[str, Tensor]:
        """Return `Trainer.weights`, or `Trainer.adapters` if the engine takes them, as a dict."""
        one = self._trainer
        weights = dict(one.adapters() if self._sends_adapters else one.weights())
        if self._takes_turns:  # the engine now needs the memory that torch keeps for later
            torch.cuda.empty_cache()
        return weights

    @releasing
    def completion_logprobs(
        self,
        prompt: Sequence[int],
        completion: Sequence[int],
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> list[float]:
        """As `Trainer.completion_logprobs`."""
        return self._trainer.completion_logprobs(prompt, completion, temperature, top_p)

    @releasing
    def perturb_weights(self, scale: float) -> None:
        """As `Trainer.perturb_weights`."""
        self._trainer.perturb_weights(scale)

    def save(
        self,
        folder: Path,
        position: Position,
        rollouts: Mapping[str, Any],
        keep: int,
        end_token_ids: frozenset[int] = frozenset(),
    ) -> Path:
        """Write a checkpoint; see `checkpoint.save`."""
        return checkpoint.save(
            folder, self._trainer, self._tokenizer, position, rollouts, keep, end_token_ids
        )

    @releasing
    def load(self, path: Path) -> None:
        """Load weights, optimizer and sigma from a checkpoint."""
        checkpoint.load(path, self._trainer)

    def close(self) -> None:
        """Leave the group of ranks."""
        self._exit.close()


def with_run_seed(config: Config) -> AlgorithmConfig:
    """Return the algorithm of a run, with noise that depends on the run's seed."""
    noise = config.algorithm.perturbation
    if noise is None:
        return config.algorithm
    noise = noise.model_copy(update={"seed": noise.seed + config.seed})
    return config.algorithm.model_copy(update={"perturbation": noise})
