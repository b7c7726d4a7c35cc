"""Weights on their way through Ray's object store: as bytes that need no copy to be read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Packed = Mapping[str, tuple[str, tuple[int, ...], Any]]
"""Name -> dtype, shape, and a uint8 array of numpy."""


def pack(weights: Mapping[str, Tensor]) -> Packed:
    """Return tensors, of any dtype, as what Ray shares between the processes of a node."""
    return {
        name: (
            str(tensor.dtype).removeprefix("torch."),
            tuple(tensor.shape),
            tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy(),
        )
        for name, tensor in weights.items()
    }


def unpack(packed: Packed) -> dict[str, Tensor]:
    """Undo `pack`; the tensors are copies, since what is shared must not be written to."""
    return {
        name: torch.from_numpy(array.copy()).view(getattr(torch, dtype)).reshape(shape)
        for name, (dtype, shape, array) in packed.items()
    }
