"""The keys and values of the sequences that the embedded engine is sampling.

There is one row per sequence, and no gap between rows: when a sequence leaves, the last row moves
into its row, so that the running batch is always a slice and is never gathered. Memory is rows
times width, allocated anew when either is too small. Many short sequences followed by a few long
ones therefore never take the memory of many long ones. A sequence that shares a prefix has only the
tokens after it in its row. The token budget bounds rows times width and prefixes together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tir_alp.engines.embedded.prefix import Prefix, States

ROUTING = -1
"""Number of what is kept like the keys of a layer, and is the experts [tokens, L, E] of each token.
"""

_ROW_STEP, _WIDTH_STEP = 16, 64  # memory grows by blocks, so that growth is rare


class KVCache:
    """Rows of keys and values, one pair of tensors per layer.

    Args:
        max_tokens: Bound of rows times width. The caller adds a row only if there is room.
    """

    shares_prefixes = True

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.lengths: list[int] = []
        """Tokens cached in each row."""
        self.prefixes: list[Prefix | None] = []
        """What each sequence has before its row."""
        self.num_shared = 0
        """Tokens of the prefixes in use, by which rows times width has to be smaller."""
        self.size = 0
        """Tokens that memory is allocated for: rows times width."""

    def add_row(self, prefix: Prefix | None = None) -> int:
        """Append an empty row; returns its index."""
        self.lengths.append(0)
        self.prefixes.append(prefix)
        return len(self.lengths) - 1

    def num_cached(self, row: int) -> int:
        """Tokens of a sequence that are cached: those of its prefix, and those in its row."""
        prefix = self.prefixes[row]
        return (len(prefix) if prefix else 0) + self.lengths[row]

    def routing(self, row: int) -> Tensor | None:
        """Experts [T, L, E] of the cached tokens of a sequence; None: the model has no routers."""
        if ROUTING not in self._layers:
            return None
        own, prefix = self._layers[ROUTING][0][row, : self.lengths[row]], self.prefixes[row]
        return own if prefix is None else torch.cat([prefix.states(ROUTING)[0], own])

    @torch.inference_mode()
    def copy_row(self, row: int) -> States:
        """Copy what a row has cached, so that the row can be removed."""
        length = self.lengths[row]
        return {
            layer: (keys[row, :length].clone(), values[row, :length].clone())
            for layer, (keys, values) in self._layers.items()
        }

    @torch.inference_mode()
    def fill_row(self, row: int, states: States) -> None:
        """Fill an empty row with the copy of another one."""
        for layer, (key, value) in states.items():
            self.lengths[row] = len(key)
            keys, values = self.layer(layer, len(key), key, value)
            keys[row, : len(key)] = key
            values[row, : len(key)] = value

    @torch.inference_mode()
    def copy_beginning(self, source: int, row: int, length: int) -> None:
        """Fill an empty row with the first tokens of another row."""
        states = {
            layer: (keys[source, :length], values[source, :length])
            for layer, (keys, values) in self._layers.items()
        }
        self.fill_row(row, states)

    @torch.inference_mode()
    def remove_row(self, row: int) -> None:
        """Remove a row; the last row takes its index."""
        last = len(self.lengths) - 1
        if row != last:
            length = self.lengths[last]
            for states in (states for layer in self._layers.values() for states in layer):
                states[row, :length] = states[last, :length]
            self.lengths[row], self.prefixes[row] = self.lengths[last], self.prefixes[last]
        self.lengths.pop()
        self.prefixes.pop()

    def clear(self) -> None:
        """Remove every row, e.g. because the weights that computed them are gone."""
        self.lengths.clear()
        self.prefixes.clear()
        self._layers.clear()
        self.size = 0

    def size_for(self, num_rows: int, width: int, num_shared: int) -> int:
        """The largest `size` that this number of rows of this width can need."""
        needed = _round_up(num_rows, _ROW_STEP) * _round_up(width, _WIDTH_STEP)
        return min(max(self.size, needed), self._max_tokens - num_shared)

    def layer(self, layer: int, width: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values [R, W, heads, D] of a layer, with room for all rows and `width`.

        What any row has cached is kept.

        Args:
            layer: Index of the layer.
            width: Tokens that the longest row of this forward has to hold.
            key: [N, heads, D] gives the dtype, device and shape of new tensors.
            value: [N, heads, D] does the same for the values.
        """
        have, most = self._layers.get(layer), self._max_tokens - self.num_shared
        if have is None or self._is_unfit(have[0], width, most):
            width = max(width, *self.lengths)  # rows outside this forward may be longer
            width = min(_round_up(width, _WIDTH_STEP), most // len(self.lengths))
            num_rows = min(_round_up(len(self.lengths), _ROW_STEP), most // width)
            self.size = num_rows * width
            made = (
                key.new_zeros(num_rows, width, *key.shape[1:]),
                value.new_zeros(num_rows, width, *value.shape[1:]),
            )
            for old, new in zip(have or made, made, strict=True):
                kept = old[:num_rows, :width]
                new[: kept.shape[0], : kept.shape[1]] = kept
            self._layers[layer] = have = made
        return have

    def _is_unfit(self, states: Tensor, width: int, most: int) -> bool:
        num_rows, now = states.shape[:2]
        return len(self.lengths) > num_rows or width > now or num_rows * now > most


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step
