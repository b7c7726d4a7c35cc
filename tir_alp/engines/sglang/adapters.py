"""Adapters of LoRA in SGLang servers: one at a time, beside weights that stay as they were.

Each version of the adapters has a name of its own, which requests carry. A server refuses requests
for a name that it does not have, and takes adapters only if the digest of each tensor is that which
the trainer's has.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from tir_alp.config import LoraConfig, SGLangConfig
from tir_alp.engines.adapters import peft_config, peft_names
from tir_alp.engines.servers.weights import WeightSnapshot
from tir_alp.engines.sglang.client import SGLangClient
from tir_alp.engines.sglang.weights import TensorCheck, pickled


class AdapterTransfer:
    """Sends adapters inside the request, in the place of weights.

    Args:
        config: Rank and scale of the adapters.
        num_ranks: Tensor-parallel ranks of a server; each gets a copy.
    """

    def __init__(self, config: LoraConfig, num_ranks: int = 1) -> None:
        self._config, self._num_ranks = config, num_ranks

    async def send(self, client: SGLangClient, snapshot: WeightSnapshot) -> None:
        """Replace the server's adapter."""
        assert snapshot.tensors is not None
        tensors, name = peft_names(snapshot.tensors), client.label(snapshot.version)
        limit = client.load_timeout_s
        if client.adapter is not None:
            old, client.adapter = client.adapter, None
            await client.call("/unload_lora_adapter", limit, lora_name=old)
        packed = await asyncio.to_thread(pickled, tensors)
        await client.call(
            "/load_lora_adapter_from_tensors",
            limit,
            lora_name=name,
            config_dict=peft_config(self._config, snapshot.tensors),
            serialized_named_tensors=[packed] * self._num_ranks,
            expected_checksums={each: _digest(tensor) for each, tensor in tensors.items()},
        )
        await client.call("/update_weight_version", new_version=name)
        client.adapter = name

    def forget(self, client: SGLangClient) -> None:
        """Do nothing: there is no connection."""

    def close(self) -> None:
        """Do nothing: nothing is held."""


async def verify_adapters(client: SGLangClient, snapshot: WeightSnapshot) -> TensorCheck:
    """Describe the comparison that the server made when it took the adapters: of all tensors."""
    assert snapshot.tensors is not None
    assert client.adapter == client.label(snapshot.version)
    digests = (f"{name}{_digest(each)}" for name, each in sorted(snapshot.tensors.items()))
    whole = hashlib.blake2b("".join(digests).encode(), digest_size=16)
    return TensorCheck(len(snapshot.tensors), whole.hexdigest())


def adapter_arguments(config: SGLangConfig, rank: int, modules: Sequence[str]) -> list[str]:
    """Arguments for a server that gets one adapter at a time.

    Args:
        config: Settings of the servers.
        rank: Rank of the adapter.
        modules: Last parts of the names of the layers that it extends.
    """
    backend = ["--lora-backend", "torch_native"] if config.device == "cpu" else []
    flags = ["--enable-lora", "--lora-strict-loading", "--max-loras-per-batch", "1", *backend]
    return [*flags, "--max-lora-rank", str(rank), "--lora-target-modules", *modules]


def _digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, as SGLang computes it."""
    return hashlib.sha256(tensor.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
