"""Linear layers with adapters beside their weights, for the embedded engine.

Merging an adapter rounds the sum of a weight and a change to the weight's dtype: in bfloat16 a
change below a 512th of a weight is lost. Here [W | B] multiplies [x ; s A x] in one product, whose
sum is rounded once, so that each factor is rounded by itself and their product is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tir_alp.engines.adapters import FIRST, SECOND, adapted_modules
from tir_alp.engines.embedded.thin_linear import is_thin, thin_product


class AdaptedLinear(nn.Linear):
    """A linear layer that adds scale B A x to its output.

    Its weight is a view of the joint matrix, and its adapter is 0 at first.

    Args:
        old: The layer that it replaces.
        rank: Rank of the adapter.
        scale: Scale of the adapter.
    """

    joint: Tensor
    """[out, in + rank] the weight and the second factor."""
    first: Tensor
    """[rank, in] the first factor."""

    def __init__(self, old: nn.Linear, rank: int, scale: float) -> None:
        size = (old.out_features, old.in_features)
        super().__init__(old.in_features, old.out_features, old.bias is not None, device="meta")
        weight = old.weight.detach()
        joint = weight.new_zeros(size[0], size[1] + rank)
        joint[:, : size[1]] = weight
        self.register_buffer("joint", joint, persistent=False)
        self.register_buffer("first", weight.new_zeros(rank, size[1]), persistent=False)
        self.weight = nn.Parameter(joint[:, : size[1]], requires_grad=False)
        self.bias, self._scale = old.bias, scale
        self._is_thin = is_thin(weight)

    @property
    def second(self) -> Tensor:
        """[out, rank] the second factor, as a view."""
        return self.joint[:, self.in_features :]

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Linear`, with the adapter, without gradients."""
        factor = self._scale * functional.linear(input, self.first)
        both = torch.cat((input, factor), dim=-1)
        if self._is_thin:
            return thin_product(both, self.joint, self.bias)
        return functional.linear(both, self.joint, self.bias)


def adapt(model: Any, adapters: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Give layers of a model an adapter of 0, where they have none; other names stay the same.

    Args:
        model: The engine's model.
        adapters: Tensors of adapters, which are left alone.
        scale: Scale of the adapters.

    Returns:
        The model's own tensors by the names of `adapters`, to write to.

    Raises:
        ValueError: If a layer is not in the model, or is not linear.
    """
    own = {}
    for name in adapted_modules(adapters):
        layer = dict(model.named_modules()).get(name)
        if not isinstance(layer, nn.Linear):
            raise ValueError(
                f"the engine cannot apply an adapter to {name!r}, which is no linear layer of its "
                'model: set trainer.lora.sync = "merged"'
            )
        if not isinstance(layer, AdaptedLinear):
            rank = adapters[name + FIRST].shape[0]
            layer = AdaptedLinear(layer, rank, scale)
            model.set_submodule(name, layer.train(model.training))
        own[name + FIRST], own[name + SECOND] = layer.first, layer.second
    return own
