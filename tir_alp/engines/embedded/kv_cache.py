"""The keys and values of the sequences that the embedded engine is sampling.

There is one row per sequence, and no gap between rows: when a sequence leaves, the last row moves
into its row, so that the running batch is always a slice and is never gathered. Memory is rows
times width, allocated anew when either is too small. Many short sequences followed by a few long
ones therefore never take the memory of many long ones. The token budget bounds that product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

RowStates = dict[int, tuple[Tensor, Tensor]]
"""Keys and values [heads, T, D] of one row, by layer."""

_ROW_STEP, _WIDTH_STEP = 16, 64  # memory grows by blocks, so that growth is rare


class KVCache:
    """Rows of keys and values, one pair of tensors per layer.

    Args:
        max_tokens: Bound of rows times width. The caller adds a row only if there is room.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.lengths: list[int] = []
        """Tokens cached in each row."""
        self.size = 0
        """Tokens that memory is allocated for: rows times width."""

    def add_row(self) -> int:
        """Append an empty row; returns its index."""
        self.lengths.append(0)
        return len(self.lengths) - 1

    @torch.inference_mode()
    def copy_row(self, row: int) -> RowStates:
        """Copy what a row has cached, so that the row can be removed."""
        length = self.lengths[row]
        return {
            layer: (keys[row, :, :length].clone(), values[row, :, :length].clone())
            for layer, (keys, values) in self._layers.items()
        }

    @torch.inference_mode()
    def fill_row(self, row: int, states: RowStates) -> None:
        """Fill an empty row with the copy of another one."""
        for layer, (key, value) in states.items():
            self.lengths[row] = key.shape[1]
            made = self.layer(layer, key.shape[1], key.transpose(0, 1), value.transpose(0, 1))
            for room, old in zip(made, (key, value), strict=True):
                room[row, :, : key.shape[1]] = old

    @torch.inference_mode()
    def copy_beginning(self, source: int, row: int, length: int) -> None:
        """Fill an empty row with the first tokens of another row."""
        states = {
            layer: (keys[source, :, :length], values[source, :, :length])
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
                states[row, :, :length] = states[last, :, :length]
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()

    def clear(self) -> None:
        """Remove every row, e.g. because the weights that computed them are gone."""
        self.lengths.clear()
        self._layers.clear()
        self.size = 0

    def size_for(self, num_rows: int, width: int) -> int:
        """The largest `size` that this number of rows of this width can need."""
        needed = _round_up(num_rows, _ROW_STEP) * _round_up(width, _WIDTH_STEP)
        return max(self.size, min(needed, self._max_tokens))

    def layer(self, layer: int, width: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values [R, heads, W, D] of a layer, with room for all rows and `width`.

        What any row has cached is kept.

        Args:
            layer: Index of the layer.
            width: Tokens that the longest row of this forward has to hold.
            key: [N, heads, D] gives the dtype, device and shape of new tensors.
            value: [N, heads, D] does the same for the values.
        """
        have = self._layers.get(layer)
        if have is None or len(self.lengths) > have[0].shape[0] or width > have[0].shape[2]:
            width = max(width, *self.lengths)  # rows outside this forward may be longer
            width = min(_round_up(width, _WIDTH_STEP), self._max_tokens // len(self.lengths))
            num_rows = min(_round_up(len(self.lengths), _ROW_STEP), self._max_tokens // width)
            self.size = num_rows * width
            room = (num_rows, key.shape[1], width)
            made = (key.new_zeros(*room, key.shape[2]), value.new_zeros(*room, value.shape[2]))
            for old, new in zip(have or made, made, strict=True):
                kept = old[:num_rows, :, :width]
                new[: kept.shape[0], :, : kept.shape[2]] = kept
            self._layers[layer] = have = made
        return have


class CachedStep:
    """Layout of one forward over a slice of the cache's rows, each with its next tokens.

    Args:
        cache: The keys and values.
        rows: The slice of rows that take part.
        num_new: Number of new tokens of each row: its whole context, or 1.
        device: Device of the forward.
    """

    def __init__(
        self, cache: KVCache, rows: range, num_new: list[int], device: torch.device
    ) -> None:
        self._cache, self._rows = cache, rows
        num_old = torch.tensor([cache.lengths[row] for row in rows])
        new = torch.tensor(num_new)
        offset = torch.arange(max(num_new))
        self._inside = (offset < new[:, None]).to(device)
        columns = num_old[:, None] + offset
        self.positions = columns[offset < new[:, None]].to(device)
        """[N] position of each new token in its sequence."""
        self._row_ids = torch.repeat_interleave(torch.arange(rows.start, rows.stop), new).to(device)
        self._width = int((num_old + new).max())
        self._distance = columns.to(device)[:, :, None] - torch.arange(self._width, device=device)
        self._mask = (self._distance >= 0).unsqueeze(1)  # [R, 1, Q, W]
        self.last = (new.cumsum(0) - 1).to(device)
        """[R] index of each row's last new token among the N."""

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
        """Store the new keys and values, then attend from each token to itself and all before."""
        keys, values = self._cache.layer(layer, self._width, key, value)
        keys[self._row_ids, :, self.positions] = key
        values[self._row_ids, :, self.positions] = value
        here = slice(self._rows.start, self._rows.stop)
        keys, values = keys[here, :, : self._width], values[here, :, : self._width]
        mask = self._mask
        if window is not None and self._width > window:
            mask = mask & (self._distance < window).unsqueeze(1)
        decoding = self._inside.shape[1] == 1
        if decoding:
            rows = query.unsqueeze(1)
        else:
            rows = query.new_zeros(*self._inside.shape, *query.shape[1:])
            rows[self._inside] = query
        output = F.scaled_dot_product_attention(
            rows.transpose(1, 2),
            keys,
            values,
            attn_mask=mask,
            scale=scale,
            enable_gqa=keys.shape[1] != query.shape[1],
        ).transpose(1, 2)
        return output.squeeze(1) if decoding else output[self._inside]

    def commit(self) -> None:
        """Count the new tokens as cached, after every layer has stored its keys and values."""
        num_new = self._inside.sum(1).tolist()
        for row, count in zip(self._rows, num_new, strict=True):
            self._cache.lengths[row] += count


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step
