"""Sequences with the same prompt, of which the prompt is computed once.

The tokens of a forward are those of the batch without the prompts that are computed for another
sequence. Everywhere but in attention a token needs nothing else. In attention, prompts attend
within themselves, and the other tokens attend to the prompt of their sequence and to the tokens
before them, as they would without sharing. Gradients of keys and values add up over the sequences.

What is computed where follows from the lengths alone, and is worked out on the CPU, so that a GPU
is never waited for.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tir_alp.training.attention import attend_in_rows, on_device, window_mask
from tir_alp.types import Batch, Prompts

Piece = tuple[int, int]
"""Consecutive packed tokens, by position and number."""


def shared_prompts(batch: Batch) -> Prompts | None:
    """Return the prompts of a batch if at least two sequences share one."""
    prompts = batch.prompts
    is_shared = prompts is not None and prompts.rows != tuple(range(len(batch.lengths)))
    return prompts if is_shared else None


def num_computed(batch: Batch) -> int:
    """Number of tokens that a forward computes."""
    return sum(batch.lengths) - sum(_num_left_out(batch))


def computed_tokens(batch: Batch) -> Tensor | None:
    """Return the positions [M] of the tokens that a forward computes, among the packed tokens.

    None: no prompt is shared, so it computes all of them. On the device of the batch.
    """
    if shared_prompts(batch) is None:
        return None
    return on_device(_computed(batch), batch.token_ids.device)


class SharedPrompts:
    """Layout of a batch in which sequences share their prompts.

    Axis letters: B sequences, P prompts, N tokens of the batch, M tokens that are computed; Q and K
    queries and keys of the longest row.

    Args:
        batch: The batch, whose forward runs on the device of its tokens.
        prompts: Its prompts, of which at least two are one.
    """

    computed: Tensor
    """[M] position of each token that is computed, among the packed tokens."""
    place: Tensor
    """[N] index of each packed token among those that are computed."""

    def __init__(self, batch: Batch, prompts: Prompts) -> None:
        lengths, device = batch.lengths, batch.token_ids.device
        starts = [0, *accumulate(lengths)]
        computed = _computed(batch)
        index = np.empty(starts[-1], np.int64)
        index[computed] = np.arange(len(computed))
        # A token of a prompt that is left out stands where that of the first sequence does.
        source = np.arange(starts[-1])
        for row, first in enumerate(prompts.rows):
            end = starts[row] + prompts.lengths[row]
            source[starts[row] : end] += starts[first] - starts[row]
        place = index[source]

        own = [row for row, first in enumerate(prompts.rows) if first == row]
        of_prompts, in_prompts = _rows([(starts[row], prompts.lengths[row]) for row in own], place)
        tails = [
            (start + number, length - number)
            for start, number, length in zip(starts, prompts.lengths, lengths, strict=False)
        ]
        of_tails, in_tails = _rows(tails, place)
        of_keys, _ = _rows([*zip(starts, lengths, strict=False)], place)
        # Outputs are those of all prompts and then those of all tails.
        order = np.concatenate([of_prompts[in_prompts], of_tails[in_tails]])
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        position = np.array(prompts.lengths)[:, None] + np.arange(of_tails.shape[1])
        # [B, 1, Q, K]: how many tokens each key is before the query
        distance = position[:, None, :, None] - np.arange(of_keys.shape[1])

        self.computed, self.place = on_device(computed, device), on_device(place, device)
        self._prompts = on_device(of_prompts, device)
        self._tails, self._keys = on_device(of_tails, device), on_device(of_keys, device)
        self._in_prompts = on_device(in_prompts.ravel().nonzero()[0], device)
        self._in_tails = on_device(in_tails.ravel().nonzero()[0], device)
        self._back, self._distance = on_device(back, device), on_device(distance, device)
        self._mask = self._distance >= 0

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

        def attention(queries: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
            rows = (
                states.index_select(0, index.flatten()).unflatten(0, index.shape)
                for states, index in ((query, queries), (key, keys), (value, keys))
            )
            return attend_in_rows(*rows, mask=mask, scale=scale).flatten(0, 1)

        mask = self._mask
        if window is not None:
            mask = mask & (self._distance < window)
        of_prompts = window_mask(self._prompts.shape[1], window, query.device)
        prompts = attention(self._prompts, self._prompts, of_prompts)
        tails = attention(self._tails, self._keys, mask)
        both = (prompts.index_select(0, self._in_prompts), tails.index_select(0, self._in_tails))
        return torch.cat(both).index_select(0, self._back)


def _num_left_out(batch: Batch) -> list[int]:
    """Number of tokens of each sequence that are computed for another one."""
    prompts = shared_prompts(batch)
    if prompts is None:
        return [0] * len(batch.lengths)
    return [0 if prompts.rows[row] == row else number for row, number in enumerate(prompts.lengths)]


def _computed(batch: Batch) -> NDArray[np.int64]:
    """Return what `computed_tokens` does."""
    starts = accumulate(batch.lengths, initial=0)
    pieces = zip(starts, _num_left_out(batch), batch.lengths, strict=False)
    return np.concatenate(
        [np.arange(start + number, start + length) for start, number, length in pieces]
    )


def _rows(
    pieces: Sequence[Piece], place: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Arrange pieces of the packed tokens as padded rows.

    Returns:
        The index [R, T] of each token among those that are computed, 0 in the padding, and a mask
        [R, T] without the padding.
    """
    start, length = np.array(pieces).T
    offset = np.arange(length.max())
    inside = offset < length[:, None]
    position = np.where(inside, start[:, None] + offset, 0)
    # Padding reads token 0. Causality hides it from the others, and its output is dropped.
    return np.where(inside, place[position], 0), inside
