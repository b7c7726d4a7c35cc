"""Weights on their way through Ray's object store, as bytes that can be read without a copy.

A sample of the tensors has checksums, computed by the trainer and compared by the engine.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_NUM_SUMMED = 16  # tensors with a checksum, or all if there are fewer


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """One tensor as bytes."""

    dtype: str
    shape: tuple[int, ...]
    plain: Any
    """The data, a NumPy array of uint8."""
    checksum: int | None
    """CRC-32 of `plain`; None: this tensor is not in the sample."""


Packed = Mapping[str, PackedTensor | str]
"""Tensors by name; a string is the name under which the same tensor was already packed."""


def pack(weights: Mapping[str, Tensor]) -> Packed:
    """Pack tensors of any dtype into arrays that Ray shares between the processes of a node.

    A tensor shared under two names, such as a tied head, is sent once. Engines recognise it because
    `unpack` returns the same object under both names.
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
    """Undo `pack`. The tensors are copies, because shared memory must not be written to.

    Raises:
        ValueError: If a tensor differs from the one that was packed; the message names it.
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
