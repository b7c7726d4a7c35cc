"""Small changes to a model's weights, taken back bit for bit: to see whether an engine follows.

It works on what this rank holds of each tensor, so that it costs no more than some of the weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

_NUM_TENSORS = 8  # evenly spaced, to see whether all layers are taken
_ADAPTER = ".lora_"  # one of its two factors is 0 at first, and then the other changes nothing


class WeightNudge:
    """Changes some of the weights of a model, which may be sharded.

    Args:
        model: A causal LM.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._kept: list[tuple[Tensor, Tensor]] = []  # each with what it was

    @torch.no_grad()
    def by(self, scale: float) -> None:
        """Let each tensor differ by `scale` times its spread from what it was; 0: not at all."""
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
