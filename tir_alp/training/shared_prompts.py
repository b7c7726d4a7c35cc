"""Sequences with the same prompt, of which the prompt is computed once.

The tokens of a forward are those of the batch without the prompts that are computed for another
sequence. Everywhere but in attention a token needs nothing else. In attention, prompts attend
within themselves, and the other tokens attend to the prompt of their sequence and to the tokens
before them, as they would without sharing. Gradients of keys and values add up over the sequences.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from tir_alp.training.attention import attend_in_rows
from tir_alp.types import Batch


def computed_tokens(batch: Batch) -> Tensor | None:
    """Return the positions [M] of the tokens that a forward computes, among the packed tokens.

    None: no prompt is shared, so it computes all of them.
    """
    rows = range(len(batch.lengths))
    if batch.prompt_rows == tuple(rows):
        return None
    position, device = batch.position_ids, batch.token_ids.device
    num_left_out = [
        0 if batch.prompt_rows[row] == row else batch.prompt_lengths[row] for row in rows
    ]
    return (position >= _per_token(num_left_out, batch, device)).nonzero().squeeze(1)


def num_computed(batch: Batch) -> int:
    """Number of tokens that a forward computes."""
    left_out = sum(
        length for row, length in enumerate(batch.prompt_lengths) if batch.prompt_rows[row] != row
    )
    return sum(batch.lengths) - left_out


class SharedPrompts:
    """Layout of a batch in which sequences share their prompts.

    Axis letters: B sequences, P prompts, N tokens of the batch, M tokens that are computed.
    """

    computed: Tensor
    """[M] position of each token that is computed, among the packed tokens."""
    place: Tensor
    """[N] index of each packed token among those that are computed."""

    def __init__(self, batch: Batch, computed: Tensor) -> None:
        device = computed.device
        starts = [0]
        for length in batch.lengths:
            starts.append(starts[-1] + length)
        rows = range(len(batch.lengths))
        # A token of a prompt that is left out stands where that of the first sequence does.
        shift = [starts[batch.prompt_rows[row]] - starts[row] for row in rows]
        in_prompt = batch.position_ids < _per_token(batch.prompt_lengths, batch, device)
        packed = torch.arange(starts[-1], device=device)
        source = packed + torch.where(in_prompt, _per_token(shift, batch, device), 0)
        index = torch.empty_like(packed)
        index[computed] = torch.arange(len(computed), device=device)
        self.computed, self.place = computed, index[source]

        firsts = [row for row in rows if batch.prompt_rows[row] == row]
        prompts = [(starts[row], batch.prompt_lengths[row]) for row in firsts]
        tails = [
            (
                starts[row] + batch.prompt_lengths[row],
                batch.lengths[row] - batch.prompt_lengths[row],
            )
            for row in rows
        ]
        whole = [(starts[row], batch.lengths[row]) for row in rows]
        self._prompts, in_prompts = self._rows(prompts)
        self._tails, in_tails = self._rows(tails)
        self._keys, _ = self._rows(whole)
        # Outputs come as those of all prompts and then those of all tails.
        order = torch.cat([self._prompts[in_prompts], self._tails[in_tails]])
        self._back = torch.empty_like(order)
        self._back[order] = torch.arange(len(order), device=device)
        self._in_prompts, self._in_tails = (
            inside.flatten().nonzero().squeeze(1) for inside in (in_prompts, in_tails)
        )
        first_tail = torch.tensor(batch.prompt_lengths, device=device)
        position = first_tail[:, None] + torch.arange(self._tails.shape[1], device=device)
        # [B, 1, Q, K]: how many tokens each key is before the query
        self._distance = position[:, None, :, None] - torch.arange(
            self._keys.shape[1], device=device
        )
        self._mask = self._distance >= 0

    @classmethod
    def of(cls, batch: Batch) -> Self | None:
        """Return the layout of a batch; None if no prompt is shared."""
        computed = computed_tokens(batch)
        return None if computed is None else cls(batch, computed)

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

        def rows(states: Tensor, index: Tensor) -> Tensor:
            return states.index_select(0, index.flatten()).unflatten(0, index.shape)

        def attention(queries: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
            states = (rows(query, queries), rows(key, keys), rows(value, keys))
            return attend_in_rows(*states, mask=mask, scale=scale).flatten(0, 1)

        mask, of_prompts = self._mask, None
        if window is not None:
            mask = mask & (self._distance < window)
            longest = self._prompts.shape[1]
            if longest > window:
                offset = torch.arange(longest, device=query.device)
                distance = offset[:, None] - offset
                of_prompts = (distance >= 0) & (distance < window)
        prompts = attention(self._prompts, self._prompts, of_prompts)
        tails = attention(self._tails, self._keys, mask)
        both = (prompts.index_select(0, self._in_prompts), tails.index_select(0, self._in_tails))
        return torch.cat(both).index_select(0, self._back)

    def _rows(self, pieces: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Arrange pieces of the packed tokens, each given by start and length, as padded rows.

        Returns:
            The index [R, T] of each token among those that are computed, 0 in the padding, and a
            mask [R, T] without the padding.
        """
        device = self.place.device
        start, length = torch.tensor(pieces, device=device).unbind(1)
        offset = torch.arange(max(length for _, length in pieces), device=device)
        inside = offset < length[:, None]
        position = torch.where(inside, start[:, None] + offset, 0)
        # Padding reads token 0. Causality hides it from the others, and its output is dropped.
        return torch.where(inside, self.place[position], 0), inside


def _per_token(values: list[int] | tuple[int, ...], batch: Batch, device: torch.device) -> Tensor:
    """Repeat a value of each sequence [B] for its tokens [N]."""
    lengths = torch.tensor(batch.lengths, device=device)
    return torch.tensor(values, device=device).repeat_interleave(
        lengths, output_size=sum(batch.lengths)
    )
