"""Small changes to a model's weights that can be undone bit for bit, to test engines.

An engine that takes over weights must show the effect of the change. Only this rank's share of a
few tensors is changed, so the memory for the originals is small. Where adapters are trained, they
are what changes, because an engine may get nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

_NUM_TENSORS = 8  # evenly spaced, to cover the depth of the model
_BASE, _FIRST, _SECOND = ".base_layer.weight", ".lora_A.default.weight", ".lora_B.default.weight"


class WeightNudge:
    """Changes some of the weights of a model.

    Args:
        model: A causal LM, which may be sharded.
        adapter_scale: The scale of its adapters, alpha / rank; None: it has none.
    """

    def __init__(self, model: Any, adapter_scale: float | None = None) -> None:
        self._model, self._adapter_scale = model, adapter_scale
        self._kept: list[tuple[Tensor, Tensor, float]] = []
        """Each tensor with its original and the size of a change of scale 1."""

    @torch.no_grad()
    def by(self, scale: float) -> None:
        """Change each weight by `scale` times the RMS of its original; 0 restores the original."""
        self._kept = self._kept or [(own, own.clone(), size) for own, size in self._chosen()]
        generator = torch.Generator().manual_seed(0)
        for tensor, original, size in self._kept:
            noise = torch.randn(original.shape, generator=generator).to(original)
            tensor.copy_(original + scale * size * noise if scale else original)
        if not scale:
            self._kept = []

    def _chosen(self) -> list[tuple[Tensor, float]]:
        """Return tensors to change, and by how much for the RMS of their weights to change by 1."""
        named = dict(self._model.named_parameters())
        if self._adapter_scale is None:
            return [(own, _rms(own)) for own in map(_own, _some([*named.values()])) if own.numel()]
        found = []
        for name in _some([name for name in named if name.endswith(_SECOND)]):
            module, own = name.removesuffix(_SECOND), _own(named[name])
            rank, num_inputs = named[module + _FIRST].shape
            first = 1 / sqrt(3 * num_inputs)  # RMS of the first factor, as peft draws it
            base = _own(named[module + _BASE])
            if own.numel() and base.numel():
                found.append((own, _rms(base) / (self._adapter_scale * sqrt(rank) * first)))
        return found


def _some(things: Sequence[Any]) -> Sequence[Any]:
    return things[:: max(1, len(things) // _NUM_TENSORS)]


def _own(tensor: Tensor) -> Tensor:
    """Return this rank's share of a tensor."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _rms(tensor: Tensor) -> float:
    return float(tensor.float().square().mean().sqrt())
