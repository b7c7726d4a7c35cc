"""Attention for packed sequences, shared by the trainer and the embedded engine.

In a packed forward, one row holds the tokens of all sequences one after the other, so no layer
computes padding. Only inside attention do sequences get rows of their own. This keeps every token
within its own sequence by construction, without a block mask and without a score matrix over all
tokens. Any Hugging Face decoder can use it through the registry of attention functions in
transformers; the argument `layout` of a forward says what it attends to.

Models whose sequences cannot share a row (`arrangement.py`) have padded rows throughout, with the
same attention inside of them.

None of this is a fused kernel. It refuses what it does not compute: attention sinks, soft caps,
dropout, and any mask but that of causality and a sliding window.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AttentionInterface

PACKED = "tir_alp_packed"
"""Name of packed attention for transformers: `attn_implementation=PACKED`."""
IN_ROWS = "tir_alp_in_rows"
"""Name of the same attention for sequences that are padded on their right."""

_KINDS = ("full_attention", "sliding_attention", "attention")


class Layout(Protocol):
    """How the tokens of one forward are arranged, and what each attends to."""

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
        """Attend causally within sequences, to the last `window` tokens if given.

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
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention function for decoders: takes [1, heads, N, D], returns [1, N, heads, D]."""
    _check(module, attention_mask, sliding_window, **others)
    output = layout.attend(
        module.layer_idx,  # type: ignore[arg-type]
        *(states[0].transpose(0, 1) for states in (query, key, value)),
        scale=scaling,
        window=sliding_window,
    )
    return output.unsqueeze(0), None


def _attention_in_rows(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention function for decoders: takes [B, heads, T, D], returns [B, T, heads, D]."""
    _check(module, attention_mask, sliding_window, **others)
    mask = window_mask(query.shape[2], sliding_window, query.device)
    rows = (states.transpose(1, 2) for states in (query, key, value))
    return attend_in_rows(*rows, mask=mask, scale=scaling), None


def _check(
    module: nn.Module,
    attention_mask: Tensor | None,
    window: int | None,
    *,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> None:
    """Raise ValueError for what is not computed here."""
    if softcap is not None or s_aux is not None or dropout:
        raise ValueError(
            f"{type(module).__name__} asks for soft-capped attention, attention sinks or dropout, "
            "which packed attention does not support"
        )
    kinds = getattr(module.config, "layer_types", None)
    kind = kinds[module.layer_idx] if kinds else None  # type: ignore[index]
    is_other = kind is not None and kind.endswith("attention") and kind not in _KINDS
    # A short sequence does not show the difference, so this is not left to a measurement.
    if attention_mask is not None or is_other or (kind == _KINDS[1] and window is None):
        raise ValueError(
            f"{type(module).__name__} restricts what a token sees by a mask of its own"
            f"{f', as {kind}' if kind else ''}, which packed attention does not support"
        )


AttentionInterface.register(PACKED, _attention)
AttentionInterface.register(IN_ROWS, _attention_in_rows)


def attend_in_rows(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None, scale: float | None
) -> Tensor:
    """Attend within the rows of a padded batch.

    Args:
        query: [B, Q, heads, D].
        key: [B, K, key heads, D].
        value: As `key`.
        mask: Bool, broadcasts to [B, heads, Q, K]: what a query sees; or numbers that are added to
            its scores; None: causal.
        scale: Factor of the scores; None: that of the dimension.

    Returns:
        [B, Q, heads, D].
    """
    query, key, value = (states.transpose(1, 2) for states in (query, key, value))
    output = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=key.shape[1] != query.shape[1],
    )
    return output.transpose(1, 2)


def window_mask(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """Return what each of `length` tokens sees, [Q, K] bool; None: all tokens before it."""
    if window is None or length <= window:
        return None
    offset = torch.arange(length, device=device)
    distance = offset[:, None] - offset
    return (distance >= 0) & (distance < window)


def on_device(values: NDArray, device: torch.device | str) -> Tensor:
    """Copy an array to a device, without waiting for the device."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(device, non_blocking=True)


class PackedSequences:
    """Layout of whole sequences one after the other, as the trainer uses it.

    It is worked out on the CPU, so that a GPU is never waited for.

    Args:
        lengths: Number of tokens of each sequence, in order.
        device: Device of the forward.
    """

    def __init__(self, lengths: tuple[int, ...], device: torch.device | str = "cpu") -> None:
        length = np.array(lengths)
        start = length.cumsum() - length
        offset = np.arange(max(lengths))
        self._shape = (len(lengths), max(lengths))
        inside = offset < length[:, None]
        # Padding reads token 0. Causality hides it from the others, and its output is dropped.
        rows = np.where(inside, start[:, None] + offset, 0)
        self._to_rows = on_device(rows.ravel(), device)
        self._to_packed = on_device(inside.ravel().nonzero()[0], device)

    def to_rows(self, packed: Tensor) -> Tensor:
        """Convert [N, ...] to [B, T, ...]; values in the padding are unspecified."""
        return packed.index_select(0, self._to_rows).unflatten(0, self._shape)

    def to_packed(self, rows: Tensor) -> Tensor:
        """Convert [B, T, ...] to [N, ...]."""
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
        """As `Layout.attend`."""
        mask = window_mask(self._shape[1], window, query.device)
        rows = (self.to_rows(states) for states in (query, key, value))
        return self.to_packed(attend_in_rows(*rows, mask=mask, scale=scale))
