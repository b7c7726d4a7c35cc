"""Whether the forward of a model can be divided over ranks, which is measured where it can be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from tir_alp.training.arrangement import TOLERANCE, is_packed, ordinary_tokens
from tir_alp.training.attention import PackedSequences
from tir_alp.training.policy import hidden_states, next_token_logits
from tir_alp.training.ranks import Ranks
from tir_alp.training.sequence_parallel import (
    KEY,
    DividedLayout,
    TokenShare,
    check_heads,
    joined,
)

_LENGTHS = 13, 7, 12
_NUM_TRIALS = 3  # a router near a tie can send a token elsewhere because of rounding alone
_OF_ALL_POSITIONS = ("dynamic", "longrope")
"""Rotary positions whose frequencies depend on the longest sequence of a forward."""


@torch.no_grad()
def check_division(model: Any, team: Ranks | None) -> None:
    """Refuse a model whose tokens need more of each other than attention; call on every rank.

    Args:
        model: A causal LM in float32, loaded by `load_policy`, not sharded yet.
        team: The ranks that share a forward; None: each computes its own, and nothing is refused.

    Raises:
        ValueError: If a divided forward is not exact, or cannot be divided over so many ranks.
    """
    if team is None:
        return
    name, size = type(model).__name__, team.size
    if not is_packed(model):
        raise ValueError(
            f"{KEY} = {size} needs a model whose sequences are packed, and those of {name} have "
            "rows of their own, because of layers with a state, attention sinks or soft caps "
            "(docs/models.md): set it to 1, or train another family"
        )
    text = model.config.get_text_config()
    check_heads(text.num_attention_heads, size, name)
    kinds = sorted({*_rope_types(getattr(text, "rope_parameters", None) or {})})
    if found := [each for each in kinds if each in _OF_ALL_POSITIONS]:
        raise ValueError(
            f"{KEY} = {size} does not support the rotary positions of {name}, {found[0]!r}: their "
            "frequencies depend on the longest sequence of a forward, of which a rank sees a part. "
            "Set it to 1"
        )
    shift = max(team.gather(_difference(model, team)))
    if not shift <= TOLERANCE:
        raise ValueError(
            f"{KEY} = {size} is not exact with {name}: dividing a forward over ranks changes its "
            f"logits by {shift:.1e}. Set it to 1, or train another family"
        )


def _rope_types(parameters: Mapping[str, Any]) -> Iterator[str]:
    """Yield the kinds of rotary positions, which a model can have one of for each kind of layer."""
    for name, value in parameters.items():
        if name == "rope_type":
            yield value
        elif isinstance(value, Mapping):
            yield from _rope_types(value)


def _difference(model: Any, team: Ranks) -> float:
    """Return the largest relative difference of a token's logits, of the best of some trials."""
    generator = torch.Generator().manual_seed(0)
    positions = torch.cat([torch.arange(length) for length in _LENGTHS]).to(model.device)
    layout = PackedSequences(_LENGTHS, model.device)
    found = []
    for _ in range(_NUM_TRIALS):  # all of them, since the ranks of a team must stay in step
        ids = ordinary_tokens(model, len(positions), generator)
        whole = next_token_logits(model, hidden_states(model, ids, positions, layout))
        shift = (_divided_logits(model, ids, positions, team) - whole).norm(dim=-1)
        found.append((shift / whole.norm(dim=-1)).nan_to_num(nan=torch.inf).max().item())
    return min(found)


def _divided_logits(model: Any, ids: Tensor, positions: Tensor, team: Ranks) -> Tensor:
    """Return the logits [N, V] of the packed sequences, each token's from the rank that has it."""
    share = TokenShare.of(len(ids), team)
    layout = DividedLayout(PackedSequences(_LENGTHS, ids.device), share)
    own = hidden_states(model, share.own(ids), share.own(positions), layout)
    places = torch.arange(len(ids), device=ids.device)
    return next_token_logits(
        model, torch.stack(joined([*own.T], share.own(places), len(ids), team)).T
    )
