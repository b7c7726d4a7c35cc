"""How several sequences share a forward of a model: packed, or in rows of their own.

Packed, one row holds the tokens of all sequences, and no token sees another sequence because
attention gives each its own row (`attention.py`). That is exact for decoders whose tokens meet only
in attention. Layers with a state that runs along the row (linear attention, state spaces, a
convolution) would carry it from one sequence into the next; attention with sinks or soft caps, or
written without the interface of transformers, is not what packed attention computes. In rows, every
sequence is padded on its right, and the model uses its own attention; what comes after a token
cannot change it in a causal model.

Which of the two a model needs is measured, because no list of architectures stays complete: the
logits of a sequence in company must be those that the model itself computes for it alone. A model
for which neither holds is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tir_alp.training.attention import PACKED

SPELLED_OUT = "eager"
"""transformers' name of the attention that a model's authors wrote; every family has it."""

Logits = Callable[[list[Tensor]], Tensor]
"""From sequences of tokens that share a forward, [T] each, to the logits [T, V] of the last one."""

TOLERANCE = 1e-3
"""Of the largest relative difference of a token's logits. Rounding in float32 makes 1e-6 to 1e-4;
a state that comes from another sequence makes 1e-2 to 1."""

_LENGTHS = 19, 11  # the second one, which is compared, is padded
_NUM_TRIALS = 3  # a router near a tie can send a token elsewhere because of rounding alone


def is_packed(model: Any) -> bool:
    """Whether sequences of this model are packed; otherwise they have rows of their own."""
    return model.config._attn_implementation == PACKED


@contextmanager
def spelled_out(model: Any) -> Iterator[None]:
    """Let a model use the attention that its authors wrote, inside of the `with` block."""
    before = model.config._attn_implementation
    model.set_attn_implementation(SPELLED_OUT)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def can_switch(model: Any) -> bool:
    """Whether a model's attention can be replaced after it was made."""
    with spelled_out(model):
        return model.config._attn_implementation == SPELLED_OUT


@torch.no_grad()
def difference(model: Any, logits: Logits, alone: Logits) -> float:
    """Return how far the logits of a sequence are from those that the model computes for it alone.

    Args:
        model: A causal LM in float32.
        logits: Computes the logits of the last of some sequences in company of the others.
        alone: Computes those of one sequence by the model's own forward and attention.

    Returns:
        The largest relative difference of a token's logits, of the best of some trials.
    """
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(_NUM_TRIALS):
        sequences = [ordinary_tokens(model, length, generator) for length in _LENGTHS]
        own = alone(sequences[-1:])
        shift = (logits(sequences) - own).norm(dim=-1) / own.norm(dim=-1)
        found.append(shift.nan_to_num(nan=torch.inf).max().item())
        if found[-1] <= TOLERANCE:
            break
    return min(found)


def ordinary_tokens(model: Any, length: int, generator: torch.Generator) -> Tensor:
    """Return different random tokens [length] without a meaning of their own, e.g. of images."""
    special = {
        token
        for name, value in model.config.get_text_config().to_dict().items()
        if name.endswith(("_token_id", "_token_ids")) and value is not None
        for token in (value if isinstance(value, list) else [value])
    }
    size = model.get_input_embeddings().weight.shape[0]
    ids = torch.randperm(size, generator=generator).tolist()
    ordinary = [each for each in ids if each not in special] or ids
    return torch.tensor(ordinary[:length], device=model.device)
