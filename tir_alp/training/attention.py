"""Attention for packed sequences, one function for the trainer and for the embedded engine.

A packed forward has one row with the tokens of all sequences behind one another, so that no layer
computes padding. Only here, inside attention, do sequences get rows of their own, which keeps every
token within its own sequence by construction: there is no block mask to get wrong, and none of the
square of all tokens. It plugs into any Hugging Face decoder through the library's registry of
attention functions; what a forward attends to is passed to it as the argument `layout`.

It is not a fused kernel, and it refuses what it does not compute: attention sinks, soft caps.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

PACKED = "tir_alp_packed"
"""Name to load a model with: `attn_implementation=PACKED`."""


class Layout(Protocol):
    """What the tokens of one forward are, to attention."""

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None,
        window: int | None,
    ) -> Tensor:
        """Attend within sequences, to `window` last tokens if given.

        All tensors are [N, heads, D]; keys and values may have fewer heads.
        """
        ...


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: Layout,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What decoders call, with tensors [1, heads, N, D]; the result is [1, N, heads, D]."""
    if softcap is not None or s_aux is not None or dropout:
        raise ValueError(
            f"{type(module).__name__} asks for soft-capped attention, attention sinks or dropout, "
            "which packed attention does not compute"
        )
    output = layout.attend(
        module.layer_idx,  # type: ignore[arg-type]
        *(states[0].transpose(0, 1) for states in (query, key, value)),
        scale=scaling,
        window=sliding_window,
    )
    return output.unsqueeze(0), None


AttentionInterface.register(PACKED, _attention)


class PackedSequences:
    """Layout of whole sequences behind one another: the trainer's.

    Args:
        lengths: Tokens of each sequence, in order.
        device: Where the forward runs.
    """

    def __init__(self, lengths: tuple[int, ...], device: torch.device | str = "cpu") -> None:
        num_tokens, longest = sum(lengths), max(lengths)
        length = torch.tensor(lengths, device=device)
        start = length.cumsum(0) - length
        offset = torch.arange(longest, device=device)
        self._shape = (len(lengths), longest)
        inside = offset < length[:, None]
        # Padding reads token 0; causality keeps it from being seen, and its own output is dropped.
        self._to_rows = torch.where(inside, start[:, None] + offset, 0).flatten()
        self._to_packed = inside.flatten().nonzero().squeeze(1)
        assert self._to_packed.numel() == num_tokens

    def to_rows(self, packed: Tensor) -> Tensor:
        """[N, ...] to [B, T, ...]; what stands in the padding is unspecified."""
        return packed.index_select(0, self._to_rows).unflatten(0, self._shape)

    def to_packed(self, rows: Tensor) -> Tensor:
        """[B, T, ...] to [N, ...]."""
        return rows.flatten(0, 1).index_select(0, self._to_packed)

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None,
        window: int | None,
    ) -> Tensor:
        """Causal attention within each sequence."""
        longest = self._shape[1]
        mask = None
        if window is not None and longest > window:
            distance = torch.arange(longest, device=query.device)
            distance = distance[:, None] - distance
            mask = (distance >= 0) & (distance < window)
        query, key, value = (self.to_rows(x).transpose(1, 2) for x in (query, key, value))
        output = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=key.shape[1] != query.shape[1],
        )
        return self.to_packed(output.transpose(1, 2))
