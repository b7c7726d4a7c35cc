"""Weights on their way to a server: a snapshot on the host, and a folder that the server can read.

Not here: how each kind of server takes them, and what happens to one that does not.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tir_alp.engines.base import Probe


@dataclass(frozen=True, slots=True)
class WeightSnapshot:
    """Weights that a server has to have, kept so that a restarted server can get them again."""

    version: int
    """Policy version of the weights."""
    tensors: Mapping[str, Tensor] | None
    """On the host, in the server's dtype; None: those of the folder that servers start from. Where
    the engine takes adapters, these are the adapters."""
    probe: Probe | None
    """What the trainer computes with these weights; None: the trainer was not asked."""


def snapshot_tensors(
    source: Mapping[str, Tensor] | Path, dtype: torch.dtype, *, every_name: bool = False
) -> dict[str, Tensor]:
    """Copy weights to the host, in order.

    Args:
        source: Tensors, or a folder in the Hugging Face format.
        dtype: The server's dtype, which the copies get.
        every_name: Whether a tensor that has two names, such as a tied head, is copied twice.

    Raises:
        ValueError: If the folder has no safetensors.
    """
    if isinstance(source, Path):
        files = sorted(source.glob("*.safetensors"))
        if not files:
            raise ValueError(f"there are no *.safetensors in {source}")
        source = {name: tensor for file in files for name, tensor in load_file(file).items()}
    seen: set[tuple[int, int]] = set()
    copies = {}
    for name, tensor in source.items():
        storage = (tensor.data_ptr(), tensor.numel())
        if every_name or storage not in seen:
            seen.add(storage)
            copies[name] = tensor.detach().to("cpu", dtype, copy=True).contiguous()
    return copies


def write_version(folder: Path, snapshot: WeightSnapshot) -> Path:
    """Write a snapshot's tensors to a folder of their own, and remove those of other versions.

    Args:
        folder: Parent of the folders of all versions.
        snapshot: The weights.

    Returns:
        The folder of this version.
    """
    assert snapshot.tensors is not None
    path = folder / f"version_{snapshot.version}"
    path.mkdir(parents=True, exist_ok=True)
    aside = path / "model.safetensors.part"
    save_file(dict(snapshot.tensors), aside, metadata={"format": "pt"})
    os.replace(aside, path / "model.safetensors")
    for other in folder.glob("version_*"):
        if other != path:
            shutil.rmtree(other, ignore_errors=True)
    return path
