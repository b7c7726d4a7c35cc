"""Sequences whose prompts begin alike: what they have in common is computed once.

That is the prompt of a group, and, where history was rewritten, what the prompts of an episode's
traces have in common. The tokens of a forward are those of the batch without those that are
computed for another sequence. Everywhere but in attention a token needs nothing else. In attention
it attends to the tokens before it in its sequence, as it would without sharing, wherever they were
computed. Gradients of keys and values add up over the sequences.

What is computed where follows from the lengths alone, and is worked out on the CPU, so that a GPU
is never waited for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tir_alp.training.attention import attend_in_rows, on_device, window_mask
from tir_alp.types import Batch, Prompts


def shared_prompts(batch: Batch) -> Prompts | None:
    """Return the prompts of a batch if at least two sequences share a beginning."""
    prompts = batch.prompts
    return prompts if prompts is not None and any(prompts.shared) else None


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


@dataclass(frozen=True, slots=True)
class _Block:
    """Pieces of sequences whose attention is one call, as padded rows of queries and keys."""

    queries: Tensor
    """[R, Q] index of each among the tokens that are computed."""
    keys: Tensor
    """[R, K] the same for all that they attend to."""
    inside: Tensor
    """Index of each query that is no padding, among the R * Q."""
    distance: Tensor | None
    """[R, 1, Q, K] how many tokens each key is before the query; None: rows begin with sequences,
    and keys are queries."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        """Return the outputs [T, heads, D] of the pieces, one after the other."""
        if self.distance is None:
            mask = window_mask(self.queries.shape[1], window, query.device)
        else:
            mask = self.distance >= 0
            if window is not None:
                mask = mask & (self.distance < window)
        rows = (
            states.index_select(0, index.flatten()).unflatten(0, index.shape)
            for states, index in ((query, self.queries), (key, self.keys), (value, self.keys))
        )
        output = attend_in_rows(*rows, mask=mask, scale=scale)
        return output.flatten(0, 1).index_select(0, self.inside)


class SharedPrompts:
    """Layout of a batch in which sequences share beginnings of their prompts.

    Axis letters: B sequences, N tokens of the batch, M tokens that are computed.

    Args:
        batch: The batch, whose forward runs on the device of its tokens.
        prompts: Its prompts, of which at least two have a beginning in common.
    """

    computed: Tensor
    """[M] position of each token that is computed, among the packed tokens."""
    place: Tensor
    """[N] index of each packed token among those that are computed."""

    def __init__(self, batch: Batch, prompts: Prompts) -> None:
        lengths, device = batch.lengths, batch.token_ids.device
        starts = [*accumulate(lengths, initial=0)]
        computed = _computed(batch)
        place = np.empty(starts[-1], np.int64)
        place[computed] = np.arange(len(computed))
        for row, (first, number) in enumerate(zip(prompts.rows, prompts.shared, strict=True)):
            if number:  # `first` comes before the row, so that its own places are known
                place[starts[row] : starts[row] + number] = place[starts[first] :][:number]
        # Whole prompts, what prompts add to a shared beginning, and all after the prompts: within
        # each of the three, rows are similarly long.
        pieces: list[list[_Piece]] = [[], [], []]
        for row, (number, length) in enumerate(zip(prompts.shared, prompts.lengths, strict=True)):
            if number < length:
                pieces[number > 0].append(_Piece(starts[row], number, length))
            if length < lengths[row]:
                pieces[2].append(_Piece(starts[row], length, lengths[row]))
        made = [_block(each, place, device) for each in pieces if each]
        order = np.concatenate([places for _, places in made])
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        self._blocks = [block for block, _ in made]
        self._back = on_device(back, device)
        self.computed, self.place = on_device(computed, device), on_device(place, device)

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
        outputs = [block.attend(query, key, value, scale, window) for block in self._blocks]
        return torch.cat(outputs).index_select(0, self._back)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Tokens `start` to `stop` of a sequence, which attend to all of it up to `stop`."""

    sequence: int
    """Position of its first token among the packed tokens."""
    start: int
    stop: int


def _num_left_out(batch: Batch) -> list[int]:
    """Number of tokens of each sequence that are computed for another one."""
    prompts = shared_prompts(batch)
    return [0] * len(batch.lengths) if prompts is None else [*prompts.shared]


def _computed(batch: Batch) -> NDArray[np.int64]:
    """Return what `computed_tokens` does."""
    starts = accumulate(batch.lengths, initial=0)
    pieces = zip(starts, _num_left_out(batch), batch.lengths, strict=False)
    return np.concatenate(
        [np.arange(start + number, start + length) for start, number, length in pieces]
    )


def _block(
    pieces: Sequence[_Piece], place: NDArray[np.int64], device: torch.device
) -> tuple[_Block, NDArray[np.int64]]:
    """Arrange pieces as padded rows; returns the place of each of their tokens as well, in order.

    Args:
        pieces: At least one.
        place: [N] index of each packed token among those that are computed.
        device: Device of the forward.
    """
    sequence, start, stop = np.array([astuple(each) for each in pieces]).T[..., None]
    is_whole = not start.any()
    offset = np.arange((stop - start).max())
    inside = offset < stop - start
    # Padding reads a token of the batch. Causality hides it from the others, and its output is
    # dropped.
    queries = place[np.where(inside, sequence + start + offset, 0)]
    reach = np.arange(stop.max())
    keys = queries if is_whole else place[np.where(reach < stop, sequence + reach, 0)]
    distance = None
    if not is_whole:
        distance = on_device(((start + offset)[..., None] - reach)[:, None], device)
    block = _Block(
        queries=on_device(queries, device),
        keys=on_device(keys, device),
        inside=on_device(inside.ravel().nonzero()[0], device),
        distance=distance,
    )
    return block, queries[inside]
