"""The policy divided over ranks by FSDP2: every rank holds a share of each tensor.

The weights that are trained are float32; the forward, the backward pass and what FSDP2 sends to
other ranks in them are of the compute dtype, and gradients are summed in float32. Sums, not means:
a loss has the denominators of the whole update, so that the gradients of ranks add up.

Not here: log sigma, which is so small that every rank has all of it, and in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from tir_alp.algorithm.sites import find_decoder_layers
from tir_alp.config import TrainerConfig
from tir_alp.training.policy import PolicyLogprobs
from tir_alp.training.ranks import Ranks


def shard(policy: PolicyLogprobs, config: TrainerConfig, ranks: Ranks) -> None:
    """Divide a policy over ranks, in place, and put it on their devices.

    Decoder layers are gathered one at a time, when they compute. The embeddings and the head are
    gathered for all of a forward or backward pass.
    """
    dtype = getattr(torch, config.dtype)
    offload = CPUOffloadPolicy(ranks.device.type != "cpu") if config.offload else OffloadPolicy()
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in (*find_decoder_layers(policy.model), policy):
        # Also the root is freed behind a forward: what an update changed must be gathered again.
        sharded = fully_shard(
            module,
            mesh=ranks.mesh,
            reshard_after_forward=True,
            mp_policy=precision,
            offload_policy=offload,
        )
        assert isinstance(sharded, FSDPModule)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # the only kind that gloo has
    register_fsdp_forward_method(policy, "completion_logprobs")


def gathered(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Whole tensors one after the other, so that only one stands in memory.

    Every rank has to go through it, in step with the others.
    """
    for name, tensor in tensors.items():
        yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
