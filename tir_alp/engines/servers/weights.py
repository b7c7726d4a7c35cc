"""Weights on their way into an engine: copies on the host, a folder, and a probe to tell by.

Not here: how a kind of server takes them, and what becomes of one that does not.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tir_alp.engines.base import Probe
from tir_alp.engines.servers.http_client import ServerFailed

PROBE_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.15, "float16": 0.05}
"""Largest mean difference of a probe's logprobs, by the server's dtype, in nats.

What equal weights show is far below: 1e-6 for float32, 0.01 to 0.03 for bfloat16 on small models.
"""


@dataclass(frozen=True, slots=True)
class WeightSnapshot:
    """Weights that a server is to have: kept, so that one that restarts can get them again."""

    version: int
    tensors: Mapping[str, Tensor] | None
    """On the host, in the server's dtype; None: those of the folder that servers start from."""
    probe: Probe | None
    """None: nobody computes what to expect."""


def snapshot_tensors(
    source: Mapping[str, Tensor] | Path, dtype: torch.dtype, *, every_name: bool = False
) -> dict[str, Tensor]:
    """Copy weights to the host, in order.

    Args:
        source: Tensors, or a folder in the Hugging Face format.
        dtype: Of the server.
        every_name: Whether a tensor of two names, such as a tied head, is copied twice.

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
    """Write a snapshot's tensors below a folder, and remove those of other versions.

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


class Prompted(Protocol):
    """What can be asked for the logprobs of a sequence."""

    url: str

    async def prompt_logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """Logprob of each token but the first, at temperature 1."""
        ...


async def verify_probe(client: Prompted, snapshot: WeightSnapshot, dtype: str) -> float | None:
    """Compare the logprobs of the snapshot's probe with those of the server.

    Returns:
        The mean difference in nats, None without a probe.

    Raises:
        ServerFailed: If it is beyond what the dtype explains.
    """
    if snapshot.probe is None:
        return None
    said = await client.prompt_logprobs(snapshot.probe.token_ids)
    distance = mean_distance(said, snapshot.probe.logprobs)
    if not distance <= PROBE_TOLERANCE[dtype]:
        raise ServerFailed(
            f"{client.url} does not sample from the weights of version {snapshot.version}: "
            f"logprobs of a probe are {distance:.3g} nats from the trainer's, and {dtype} explains "
            f"{PROBE_TOLERANCE[dtype]:g}"
        )
    return distance


def mean_distance(some: Sequence[float], others: Sequence[float]) -> float:
    """Mean |difference|; infinite where the lengths differ or a number is not finite."""
    if len(some) != len(others) or not some:
        return float("inf")
    distance = sum(abs(a - b) for a, b in zip(some, others, strict=True)) / len(some)
    return distance if distance == distance else float("inf")
