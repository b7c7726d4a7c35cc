"""Numbers of few bits, emulated: the weights that an engine with quantisation really computes with.

A laptop has no kernels for them, but the *mismatch* between engine and trainer needs none: rounding
the weights is enough. Pure.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tir_alp.algorithm.sites import find_decoder_layers

_LARGEST = {"int8": 127.0, "fp8": torch.finfo(torch.float8_e4m3fn).max}
"""The largest number of each format; `fp8` is e4m3."""


def layer_matrices(model: nn.Module) -> frozenset[str]:
    """Names of the matrices in the decoder layers, which serving engines quantise."""
    inside = {id(p) for p in find_decoder_layers(model).parameters() if p.dim() >= 2}
    return frozenset(name for name, p in model.named_parameters() if id(p) in inside)


def quantised(weight: Tensor, precision: str) -> Tensor:
    """Round a matrix to the numbers that `int8` or `fp8` can hold, with one scale per output row.

    Args:
        weight: [rows, columns, ...]; a row's largest magnitude becomes the format's largest number.
        precision: "int8" or "fp8".

    Returns:
        The rounded matrix in the dtype of `weight`.
    """
    largest = _LARGEST[precision]
    rows = weight.float().flatten(1)
    scale = rows.abs().amax(1, keepdim=True) / largest
    scaled = rows / torch.where(scale > 0, scale, 1.0)
    if precision == "int8":
        rounded = scaled.round()
    else:
        rounded = scaled.clamp(-largest, largest).to(torch.float8_e4m3fn).float()
    return (rounded * scale).view_as(weight).to(weight.dtype)
