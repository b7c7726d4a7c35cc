"""Small changes to a model's weights that can be undone bit for bit, to test engines.

An engine that takes over weights must show the effect of the change. Only this rank's share of a
few tensors is changed, so the memory for the originals is small.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

_NUM_TENSORS = 8  # evenly spaced, to cover the depth of the model
_ADAPTER = ".lora_"  # left out: while one factor is 0, as at first, the other has no effect


class WeightNudge:
    """Changes some of the weights of a model.

    Args:
        model: A causal LM, which may be sharded.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._kept: list[tuple[Tensor, Tensor]] = []  # each with its original

    @torch.no_grad()
    def by(self, scale: float) -> None:
        """Change each tensor by `scale` times the RMS of its original; 0 restores the original."""
        self._kept = self._kept or [(each, each.clone()) for each in self._chosen()]
        generator = torch.Generator().manual_seed(0)
        for tensor, original in self._kept:
            noise = torch.randn(original.shape, generator=generator).to(original)
            spread = original.square().mean().sqrt()
            tensor.copy_(original + scale * spread * noise if scale else original)
        if not scale:
            self._kept = []

    def _chosen(self) -> list[Tensor]:
        weights = [each for name, each in self._model.named_parameters() if _ADAPTER not in name]
        chosen = weights[:: max(1, len(weights) // _NUM_TENSORS)]
        own = [each.to_local() if isinstance(each, DTensor) else each for each in chosen]
        return [each.detach() for each in own if each.numel()]
