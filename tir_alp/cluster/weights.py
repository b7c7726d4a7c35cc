"""Weights on their way through Ray's object store: as bytes that need no copy to be read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Packed = Mapping[str, tuple[str, tuple[int, ...], Any] | str]
"""Name -> dtype, shape, and a uint8 array of numpy; or the name that has the same tensor."""


def pack(weights: Mapping[str, Tensor]) -> Packed:
    """Return tensors, of any dtype, as what Ray shares between the processes of a node.

    One of two names, such as a tied head, goes once: engines tell it by its being one.
    """
    packed: dict[str, tuple[str, tuple[int, ...], Any] | str] = {}
    names: dict[tuple[Any, ...], str] = {}
    for name, tensor in weights.items():
        same = tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
        first = names.setdefault(same, name)
        packed[name] = first if first != name and tensor.numel() else _pack(tensor)
    return packed


def unpack(packed: Packed) -> dict[str, Tensor]:
    """Undo `pack`; the tensors are copies, since what is shared must not be written to."""
    weights: dict[str, Tensor] = {}
    for name, each in packed.items():
        weights[name] = weights[each] if isinstance(each, str) else _unpack(*each)
    return weights


def _pack(tensor: Tensor) -> tuple[str, tuple[int, ...], Any]:
    plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), plain


def _unpack(dtype: str, shape: tuple[int, ...], array: Any) -> Tensor:
    return torch.from_numpy(array.copy()).view(getattr(torch, dtype)).reshape(shape)
