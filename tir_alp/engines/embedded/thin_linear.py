"""Linear layers that read their weights as they lie in memory when they multiply few tokens.

In bfloat16 a CPU's matrix units take their second factor in an order of its own, and oneDNN
arranges it anew at every call. In x W^T that is the weight, which a decode step has to read anyway
and now reads and writes once more. In W x^T it is the handful of tokens. The numbers are the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

MAX_TOKENS = 256
"""For more tokens the products take longer than arranging the weight."""


class ThinLinear(nn.Linear):
    """A linear layer in bfloat16 on a CPU, for a few tokens at a time."""

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Linear`, without gradients."""
        return thin_product(input, self.weight, self.bias)


def is_thin(weight: Tensor) -> bool:
    """Whether `thin_product` is for a weight: in bfloat16, on a CPU."""
    return weight.dtype == torch.bfloat16 and weight.device.type == "cpu"


def thin_product(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return what a linear layer computes, without gradients."""
    tokens = input.flatten(0, -2)
    if len(tokens) > MAX_TOKENS:
        return functional.linear(input, weight, bias)
    columns = tokens.contiguous().t()
    if bias is None:
        output = torch.mm(weight, columns)
    else:
        output = torch.addmm(bias[:, None], weight, columns)
    return output.t().contiguous().unflatten(0, input.shape[:-1])


def use_thin_linears(model: Any) -> None:
    """Replace linear layers in bfloat16 on a CPU; parameters and their names stay the same."""
    for name, old in [*model.named_modules()]:
        if type(old) is not nn.Linear or not is_thin(old.weight):
            continue
        new = ThinLinear(old.in_features, old.out_features, old.bias is not None, device="meta")
        new.weight, new.bias = old.weight, old.bias
        model.set_submodule(name, new.train(old.training))
