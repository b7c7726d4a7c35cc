"""Weights on their way through Ray's object store: as bytes that need no copy to be read.

A sample of the tensors has checksums, made where the trainer is and compared where the engine is.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_NUM_SUMMED = 16  # tensors, at the least if there are so many


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """One tensor as bytes."""

    dtype: str
    shape: tuple[int, ...]
    plain: Any
    """A uint8 array of numpy."""
    checksum: int | None
    """CRC-32 of `plain`; None: this tensor is not in the sample."""


Packed = Mapping[str, PackedTensor | str]
"""By name; or the name that has the same tensor."""


def pack(weights: Mapping[str, Tensor]) -> Packed:
    """Return tensors, of any dtype, as what Ray shares between the processes of a node.

    One of two names, such as a tied head, goes once: engines tell it by its being one.
    """
    packed: dict[str, PackedTensor | str] = {}
    names: dict[tuple[Any, ...], str] = {}
    every = max(1, len(weights) // _NUM_SUMMED)
    for index, (name, tensor) in enumerate(weights.items()):
        same = tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
        first = names.setdefault(same, name)
        is_again = first != name and tensor.numel()
        packed[name] = first if is_again else _pack(tensor, index % every == 0)
    return packed


def unpack(packed: Packed) -> dict[str, Tensor]:
    """Undo `pack`; the tensors are copies, since what is shared must not be written to.

    Raises:
        ValueError: If a tensor is not what was packed; it is named.
    """
    weights: dict[str, Tensor] = {}
    for name, each in packed.items():
        if isinstance(each, str):
            weights[name] = weights[each]
            continue
        if each.checksum not in (None, zlib.crc32(each.plain.data)):
            raise ValueError(f"the tensor {name!r} did not arrive as the trainer sent it")
        weights[name] = _unpack(each)
    return weights


def _pack(tensor: Tensor, is_summed: bool) -> PackedTensor:
    plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return PackedTensor(
        dtype=str(tensor.dtype).removeprefix("torch."),
        shape=tuple(tensor.shape),
        plain=plain,
        checksum=zlib.crc32(plain.data) if is_summed else None,
    )


def _unpack(packed: PackedTensor) -> Tensor:
    tensor = torch.from_numpy(packed.plain.copy()).view(getattr(torch, packed.dtype))
    return tensor.reshape(packed.shape)
