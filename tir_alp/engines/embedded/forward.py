"""The embedded engine's model: one forward per step over the running batch, and its weights.

Everything here runs in the engine's own thread; nothing here decides which requests run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tir_alp.algorithm.noise import name_hashes, normal, nth_keys
from tir_alp.engines.base import EngineFailed
from tir_alp.engines.embedded.kv_cache import CachedStep, KVCache
from tir_alp.engines.embedded.precision import layer_matrices, quantised
from tir_alp.engines.embedded.request import EmbeddedRequest
from tir_alp.engines.embedded.sampling import sample
from tir_alp.training.policy import hidden_states, next_token_logits


class CachedForward:
    """A model that reads and samples with the cache.

    Args:
        model: A causal LM loaded by `load_policy`; it is written to.
        cache: The keys and values of the running requests, one row per request, in their order.
        precision: "float32", "bfloat16", "int8" or "fp8"; see `TransformersConfig`.
        logit_noise: Standard deviation of noise on the logits.
    """

    def __init__(self, model: Any, cache: KVCache, precision: str, logit_noise: float) -> None:
        self.model: Any = model.eval().requires_grad_(False)
        self._cache, self._precision, self._logit_noise = cache, precision, logit_noise
        if precision == "bfloat16":
            self.model = model.to(torch.bfloat16)
        self._quantised = layer_matrices(model) if precision in ("int8", "fp8") else frozenset()
        if self._quantised:
            self.copy_weights(model.state_dict())

    @torch.no_grad()
    def copy_weights(self, source: Mapping[str, Tensor]) -> int:
        """Copy weights into the model; returns the number of tensors compared afterwards.

        Raises:
            EngineFailed: If a tensor that is not quantised differs from its source afterwards.
        """
        own = self.model.state_dict()
        for name, tensor in own.items():
            new = source[name]
            tensor.copy_(quantised(new, self._precision) if name in self._quantised else new)
        compared = [name for name in own if name not in self._quantised]
        for name in compared:
            if not torch.equal(own[name], source[name].to(own[name])):
                raise EngineFailed(
                    f"the engine does not hold the weights that it was given: {name!r} differs. "
                    "Its numbers are not finite, or its model has it tied to another tensor"
                )
        return len(compared)

    @torch.inference_mode()
    def step(self, running: Sequence[EmbeddedRequest], num_joining: int, version: int) -> int:
        """Sample one token for every running request.

        Args:
            running: The requests, in the order of the cache's rows.
            num_joining: How many of them, at the end, have no row yet: their first forward reads
                all of their tokens.
            version: Policy version of the model's weights.

        Returns:
            The number of tokens sampled.
        """
        first = len(running) - num_joining
        if first:
            old = running[:first]
            self._forward(range(first), old, [each.token_ids[-1:] for each in old], version)
        if num_joining:
            joining, rows = running[first:], range(first, len(running))
            for row, request in zip(rows, joining, strict=True):
                self._cache.add_row()
                if request.parked is not None:
                    self._cache.fill_row(row, request.parked.states)
                    request.parked = None
            so_far = [[*each.prompt, *each.token_ids] for each in joining]
            lengths = self._cache.lengths[first:]
            unread = [ids[length:] for ids, length in zip(so_far, lengths, strict=True)]
            self._forward(rows, joining, unread, version)
        return len(running)

    def _forward(
        self,
        rows: range,
        requests: Sequence[EmbeddedRequest],
        new_tokens: Sequence[Sequence[int]],
        version: int,
    ) -> None:
        device = self.model.device
        step = CachedStep(self._cache, rows, [len(tokens) for tokens in new_tokens], device)
        token_ids = torch.tensor([token for tokens in new_tokens for token in tokens])
        hidden = hidden_states(self.model, token_ids.to(device), step.positions, step)
        step.commit()
        logits = next_token_logits(self.model, hidden[step.last]).cpu()
        if self._logit_noise > 0:
            logits = logits + self._noise(requests, logits.shape[1])
        sampled, logprobs = sample(
            logits,
            torch.tensor([request.sampling.temperature for request in requests]),
            torch.tensor([request.sampling.top_p for request in requests]),
            torch.tensor([request.uniforms[len(request.token_ids)] for request in requests]),
        )
        for request, token_id, logprob in zip(
            requests, sampled.tolist(), logprobs.tolist(), strict=True
        ):
            if request.stop_reason is None:  # else it was aborted while this forward ran
                request.push(token_id, logprob, version)

    def _noise(self, requests: Sequence[EmbeddedRequest], vocab_size: int) -> Tensor:
        """[R, V] noise, a function of run seed, sequence and position."""
        streams = name_hashes(
            f"logits/{each.sampling.seed}/{each.sampling.sequence_uid}" for each in requests
        )
        positions = torch.tensor([each.num_tokens for each in requests])
        return self._logit_noise * normal(nth_keys(streams, positions), vocab_size)
