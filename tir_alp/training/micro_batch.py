"""A micro-batch on its way through the loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tir_alp.algorithm.inputs import LossInputs
from tir_alp.algorithm.ratio_summary import RatioSummary, summarise
from tir_alp.types import Batch


@dataclass(frozen=True, slots=True)
class SeenBatch:
    """What the loss saw of one micro-batch, on the device: [B, T] each."""

    batch: Batch
    logprobs: Tensor
    """Without gradient."""
    entropy: Tensor
    clipped: Mapping[str, Tensor]
    metrics: Mapping[str, Tensor]
    """Scalars."""

    def summary(self) -> RatioSummary:
        """Summarise the ratios, on the CPU."""
        batch = moved(self.batch, torch.device("cpu"))
        clipped = {side: each.cpu() for side, each in self.clipped.items()}
        return summarise(loss_inputs(batch, self.logprobs.cpu()), self.entropy.cpu(), clipped)

    def lag(self) -> RatioSummary:
        """Summarise the ratios of the policy over the proximal policy, on the CPU."""
        batch = moved(self.batch, torch.device("cpu"))
        assert batch.proximal_logprobs is not None
        inputs = loss_inputs(batch, self.logprobs.cpu())
        return summarise(replace(inputs, rollout_logprobs=batch.proximal_logprobs))


def loss_inputs(
    batch: Batch, logprobs: Tensor | None = None, entropy: Tensor | None = None
) -> LossInputs:
    """Return loss inputs; None: `logprobs` will not be read, and rollout logprobs stand in."""
    logprobs = batch.rollout_logprobs if logprobs is None else logprobs
    proximal = batch.proximal_logprobs
    if batch.interpolation is not None:
        proximal = batch.rollout_logprobs.lerp(logprobs.detach(), batch.interpolation)
    wide = batch.token_advantages
    return LossInputs(
        logprobs=logprobs,
        rollout_logprobs=batch.rollout_logprobs,
        advantages=batch.advantages if wide is None else wide,
        loss_mask=batch.loss_mask,
        proximal_logprobs=proximal,
        reference_logprobs=batch.reference_logprobs,
        turn_ids=batch.turn_ids,
        entropy=entropy,
        selected=batch.selected,
        weights=batch.weights,
    )


def moved(batch: Batch, device: torch.device) -> Batch:
    """Return a micro-batch on a device, without waiting for the device."""
    tensors = {
        name: value.to(device, non_blocking=device.type != "cpu")
        for name in Batch.__slots__
        if isinstance(value := getattr(batch, name), Tensor)
    }
    return replace(batch, **tensors)
