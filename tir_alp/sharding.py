"""The policy divided over ranks by FSDP2: every rank holds a share of each tensor.

The weights that are trained are float32; the forward, the backward pass and what FSDP2 sends to
other ranks in them are of the compute dtype, and gradients are summed in float32. Sums, not means:
a loss has the denominators of the whole update, so that the gradients of ranks add up.

Not here: log sigma, which is so small that every rank has all of it, and in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from tir_alp.attention import PackedSequences
from tir_alp.batch import loss_positions, to_rows
from tir_alp.config import TrainerConfig
from tir_alp.parallel import Ranks
from tir_alp.perturbation import find_decoder_layers
from tir_alp.policy import completion_logprobs, hidden_states, token_logprobs
from tir_alp.types import Batch


class PolicyLogprobs(nn.Module):
    """A causal LM as one call from a micro-batch to logprobs: the unit that FSDP2 needs.

    Args:
        model: Loaded by `load_policy`; its embeddings and its head are used inside one forward.
        chunk_tokens: Logits stand for at most so many tokens at a time.
    """

    def __init__(self, model: Any, chunk_tokens: int) -> None:
        super().__init__()
        self.model, self._chunk_tokens = model, chunk_tokens

    def forward(
        self, batch: Batch, *, temperature: float, is_head_noisy: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Logprobs and entropies [B, T] of the tokens of the loss, 0 elsewhere; float32.

        Args:
            batch: On the device of the model.
            temperature: Of the sampled distribution.
            is_head_noisy: Whether there is noise on the logits.
        """
        layout = PackedSequences(batch.lengths, batch.token_ids.device)
        hidden = hidden_states(self.model, batch.token_ids, batch.position_ids, layout)
        places = loss_positions(batch)
        logprobs, entropy = token_logprobs(
            self.model,
            hidden.index_select(0, places - 1),
            batch.token_ids[places],
            temperature=temperature,
            chunk_tokens=self._chunk_tokens,
            rows=places - 1 if is_head_noisy else None,
        )
        return to_rows(batch, logprobs), to_rows(batch, entropy)

    def completion_logprobs(
        self, token_ids: Tensor, num_prompt: int, temperature: float, top_p: float
    ) -> Tensor:
        """As `policy.completion_logprobs`."""
        return completion_logprobs(self.model, token_ids, num_prompt, temperature, top_p)


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
