"""The forwards that a trainer makes of a micro-batch, with noise and with replayed routing.

Which models compute them, how these are divided over ranks and which tokens each rank has is known
here alone; losses, updates and metrics are not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tir_alp.algorithm.perturbation import Effect, LayerwisePerturbation
from tir_alp.algorithm.presets import AlgorithmConfig
from tir_alp.config import TrainerConfig
from tir_alp.training.batch import noise_keys
from tir_alp.training.policy import PolicyLogprobs, recompute_layers
from tir_alp.training.preparation import needs_collisions
from tir_alp.training.ranks import Ranks
from tir_alp.training.routing import RouterCounts, find_routers, replayed, router_metrics
from tir_alp.training.sharding import shard
from tir_alp.types import Batch


class Forwards:
    """The policy with its noise and routers, and the reference policy; takes them over, in place.

    Args:
        model: The policy, with its adapters if there are any.
        reference: The frozen initial model; None: there is none.
        config: Settings of precision and memory.
        algorithm: The objective.
        ranks: The processes over which the models are divided.
        team: Those of them that share each forward; None: each computes its own.
        temperature: Temperature of the sampled distribution.
    """

    policy: PolicyLogprobs
    perturbation: LayerwisePerturbation | None
    """The noise of ALP; None: there is none."""
    num_draws: int
    """Number of draws of the noise in an update, 1 without noise."""

    def __init__(
        self,
        model: Any,
        reference: Any | None,
        config: TrainerConfig,
        algorithm: AlgorithmConfig,
        ranks: Ranks,
        team: Ranks | None,
        temperature: float,
    ) -> None:
        self._config, self._algorithm, self._temperature = config, algorithm, temperature
        self._ranks, self._team = ranks, team
        self._routers = find_routers(model)
        self._counts = None if self._routers is None else RouterCounts(self._routers)
        if config.gradient_checkpointing:
            recompute_layers(model, offload=config.offload_activations)
        model.train()
        self.policy = self._sharded(model)
        self._reference = None if reference is None else self._sharded(reference)
        noise = algorithm.perturbation
        self.perturbation, self.num_draws = None, 1
        if noise is not None:
            self.num_draws = noise.draws
            self.perturbation = LayerwisePerturbation(model, noise)
        self._is_head_noisy = noise is not None and noise.site == "logits"

    @property
    def replays_routing(self) -> bool:
        """Whether batches have to say which experts computed their tokens in the engine."""
        return self._config.replay_routing and self._routers is not None

    def trained(self, batch: Batch) -> tuple[Tensor, ...]:
        """Return logprobs and entropies [B, T] under the current weights, with their gradients.

        Call it inside of `perturbed`, and the backward pass too.
        """
        return self.policy(
            batch,
            temperature=self._temperature,
            is_head_noisy=self._is_head_noisy,
            entropy_has_gradient=self._algorithm.entropy_bonus > 0,
        )

    def clean(self, batch: Batch) -> tuple[Tensor, ...]:
        """Return logprobs and entropies [B, T] under the current weights, without noise."""
        with self._replayed(batch):
            return self._frozen(self.policy, batch)

    def proximal(self, batch: Batch) -> tuple[Tensor, ...]:
        """As `clean`, with the collision probabilities [B, T] if the method reads them."""
        with self._replayed(batch):
            return self._frozen(self.policy, batch, needs_collisions(self._algorithm))

    def with_reference(self, batch: Batch) -> Batch:
        """Add the logprobs of the reference policy to a batch, if there is one."""
        if self._reference is None:
            return batch
        return replace(batch, reference_logprobs=self._frozen(self._reference, batch)[0])

    @contextmanager
    def perturbed(self, batch: Batch, update: int, draw: int, measure: bool) -> Iterator[Effect]:
        """Let forwards of a batch inside of the `with` block have an update's noise and routing.

        Args:
            batch: The micro-batch.
            update: Number of updates of the run before this one.
            draw: Index of one of the draws of an update.
            measure: Whether to fill the effect of the noise.
        """
        noise: AbstractContextManager[Effect] = nullcontext(Effect())
        if self.perturbation is not None:
            noise = self.perturbation.active(
                noise_keys(batch, update),
                batch.lengths,
                draw=draw,
                measure=measure,
                in_forward=self.policy.tokens_in_forward(batch),
            )
        with self._replayed(batch, self._counts), noise as effect:
            yield effect

    def router_metrics(self) -> dict[str, float]:
        """Describe the routing of the trained forwards since the last call; call on every rank."""
        if self._routers is None or self._counts is None:
            return {}
        sums, self._counts = self._counts.sums(), RouterCounts(self._routers)
        return router_metrics(self._routers, self._ranks.sum(sums))

    def _replayed(
        self, batch: Batch, counts: RouterCounts | None = None
    ) -> AbstractContextManager[None]:
        if self._routers is None:
            return nullcontext()
        experts, tokens = batch.routing, self.policy.tokens_in_forward(batch)
        if experts is not None and tokens is not None:
            experts = experts[tokens]
        return replayed(self.policy, self._routers, experts, counts)

    @torch.no_grad()
    def _frozen(
        self, policy: PolicyLogprobs, batch: Batch, with_collisions: bool = False
    ) -> tuple[Tensor, ...]:
        return policy(batch, temperature=self._temperature, with_collisions=with_collisions)

    def _sharded(self, model: Any) -> PolicyLogprobs:
        num_words = model.get_output_embeddings().weight.shape[0]
        policy = PolicyLogprobs(model, self._config.chunk_tokens(num_words), self._team)
        shard(policy, self._config, self._ranks)
        return policy
