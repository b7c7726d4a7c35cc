"""Linear layers that read their weights as they lie in memory when they multiply few tokens.

In bfloat16 a CPU's matrix units take their second factor in an order of its own, and oneDNN
arranges it anew at every call. In x W^T that is the weight, which a decode step has to read anyway
and now reads and writes once more. In W x^T it is the handful of tokens. The numbers are the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

MAX_TOKENS = 256
"""For more tokens the products take longer than arranging the weight."""


class ThinLinear(nn.Linear):
    """A linear layer in bfloat16 on a CPU, for a few tokens at a time."""

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Linear`, without gradients."""
        tokens = input.flatten(0, -2)
        if len(tokens) > MAX_TOKENS:
            return super().forward(input)
        columns = tokens.contiguous().t()
        if self.bias is None:
            output = torch.mm(self.weight, columns)
        else:
            output = torch.addmm(self.bias[:, None], self.weight, columns)
        return output.t().contiguous().unflatten(0, input.shape[:-1])


def use_thin_linears(model: Any) -> None:
    """Replace linear layers in bfloat16 on a CPU; parameters and their names stay the same."""
    for name, old in [*model.named_modules()]:
        if type(old) is not nn.Linear or old.weight.dtype != torch.bfloat16:
            continue
        if old.weight.device.type != "cpu":
            continue
        new = ThinLinear(old.in_features, old.out_features, old.bias is not None, device="meta")
        new.weight, new.bias = old.weight, old.bias
        model.set_submodule(name, new.train(old.training))
