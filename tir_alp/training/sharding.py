"""Divides the policy over ranks by FSDP2: every rank holds a share of each tensor.

Trained weights are float32. The forward and backward passes, and what FSDP2 sends in them, use the
compute dtype; gradients are summed in float32. They are summed and not averaged, because a loss has
the denominators of the whole update.

log sigma is not sharded: it is small, so every rank has all of it, in float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather
from torch.distributed.tensor import DTensor

from tir_alp.algorithm.sites import find_decoder_layers
from tir_alp.config import TrainerConfig
from tir_alp.training.lora import Adapters
from tir_alp.training.policy import PolicyLogprobs
from tir_alp.training.ranks import Ranks


def shard(policy: PolicyLogprobs, config: TrainerConfig, ranks: Ranks) -> None:
    """Divide a policy over ranks, in place, and move it to their devices.

    Each decoder layer is gathered only while it computes. The embeddings and the head are gathered
    for a whole forward or backward pass.
    """
    dtype = getattr(torch, config.dtype)
    offload = CPUOffloadPolicy(ranks.device.type != "cpu") if config.offload else OffloadPolicy()
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in (*find_decoder_layers(policy.model), policy):
        # The root is freed after a forward too: after an update it must be gathered again.
        sharded = fully_shard(
            module,
            mesh=ranks.mesh,
            reshard_after_forward=True,
            mp_policy=precision,
            offload_policy=offload,
        )
        assert isinstance(sharded, FSDPModule)
        if ranks.size > 1:  # one rank's gradients are not divided, and a factor costs two copies
            sharded.set_gradient_divide_factor(1.0)
        else:
            sharded.set_custom_all_gather(_OwnShard())
        sharded.set_force_sum_reduction_for_comms(True)  # the only kind that gloo has
    register_fsdp_forward_method(policy, "completion_logprobs")


class _OwnShard(AllGather):
    """What the only rank gathers: FSDP2 has put it into the output already.

    gloo would copy it onto itself, with compute threads of its own that nobody can release.
    """

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Return memory for the output."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        """See that the output is what the rank has."""
        if input_tensor.data_ptr() != output_tensor.data_ptr():
            output_tensor.copy_(input_tensor)
        return None


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor that is divided over ranks as a whole one, of which it shares no memory."""
    if not isinstance(tensor, DTensor):
        return tensor
    if tensor.device_mesh.size() == 1:  # see `_OwnShard`
        return tensor.to_local().clone()
    return tensor.full_tensor()


def gathered(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield whole tensors one after the other, so that only one is in memory at a time.

    Every rank must iterate to the end, in step with the others.
    """
    for name, tensor in tensors.items():
        yield name, whole(tensor)


def on_first_rank(tensors: Iterable[tuple[str, Tensor]], ranks: Ranks) -> dict[str, Tensor]:
    """Copy tensors to the CPU on rank 0; other ranks only take part in gathering them."""
    kept = {}
    for name, tensor in tensors:
        if ranks.is_first:
            kept[name] = tensor.cpu()
    return kept


def whole_weights(model: nn.Module, adapters: Adapters | None) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a model one after the other, whole, with adapters merged.

    A tensor with two names, such as a tied head, is the same object under both. Every rank must
    iterate to the end.
    """
    names: dict[int, list[str]] = {}
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        names.setdefault(id(tensor), []).append(name)
    others = {first: rest for first, *rest in names.values()}
    tensors = gathered({name: state[name].detach() for name in others})
    if adapters is not None:
        tensors = adapters.merged(tensors)
    for name, tensor in tensors:
        yield name, tensor
        for other in others.get(name, ()):
            yield other, tensor
