"""What the tokens of one forward of the embedded engine attend to: an attention `Layout` each.

`CachedStep` adds the next tokens of sequences that have a row in the cache; `PrefixRead` reads
tokens that several sequences are going to share.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tir_alp.engines.embedded.kv_cache import ROUTING, KVCache
from tir_alp.engines.embedded.prefix import Prefix, PrefixStack, to_stacks
from tir_alp.engines.embedded.prefix_groups import PrefixGroups
from tir_alp.training.attention import PackedSequences, attend_in_rows


class PrefixRead:
    """Layout of a forward over whole prefixes, one after the other, which keeps their states.

    Args:
        prefixes: What is read, and gets its `stack`.
        device: Device of the forward.
    """

    def __init__(self, prefixes: Sequence[Prefix], device: torch.device) -> None:
        for members in to_stacks(prefixes):
            stack = PrefixStack(tuple(map(len, members)))
            for place, prefix in enumerate(members):
                prefix.stack, prefix.place = stack, place
        self._prefixes, self._lengths = prefixes, [len(each) for each in prefixes]
        self._packed = PackedSequences(tuple(self._lengths), device)
        self.positions = torch.cat([torch.arange(each) for each in self._lengths]).to(device)
        """[N] position of each token in its sequence."""

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
        """Keep the keys and values, and attend as `PackedSequences` does."""
        of_each = zip(key.split(self._lengths), value.split(self._lengths), strict=True)
        for prefix, (keys, values) in zip(self._prefixes, of_each, strict=True):
            prefix.keep(layer, keys, values)
        return self._packed.attend(layer, query, key, value, scale=scale, window=window)

    def keep_routing(self, experts: Tensor) -> None:
        """Keep the experts [N, L, E] of the tokens."""
        for prefix, own in zip(self._prefixes, experts.split(self._lengths), strict=True):
            prefix.keep(ROUTING, own, own[:, :0])


class CachedStep:
    """Layout of one forward over a slice of the cache's rows, each with its next tokens.

    Axis letters: R rows of the slice, Q new tokens of the row that has most, N new tokens of all
    rows, W tokens of the longest row.

    Args:
        cache: The keys and values.
        rows: The slice of rows that take part.
        num_new: Number of new tokens of each row: its whole context, or 1.
        device: Device of the forward.
    """

    def __init__(
        self, cache: KVCache, rows: range, num_new: list[int], device: torch.device
    ) -> None:
        self._cache, self._rows, self._num_new = cache, rows, num_new
        self._here = slice(rows.start, rows.stop)
        lengths, prefixes = cache.lengths[self._here], cache.prefixes[self._here]
        self._width = max(map(sum, zip(lengths, num_new, strict=True)))
        self._is_first = not any(lengths) and not any(prefixes)
        self._groups = PrefixGroups(prefixes, device) if any(prefixes) else None
        new, offset = torch.tensor(num_new), torch.arange(max(num_new))
        inside = offset < new[:, None]
        columns = torch.tensor(lengths)[:, None] + offset
        starts = torch.tensor([len(each) if each else 0 for each in prefixes])[:, None]
        row_ids = torch.repeat_interleave(torch.arange(rows.start, rows.stop), new)
        self._longest = int((starts + columns).max()) + 1
        self._starts, self._places = starts.to(device), (starts + columns).to(device)
        self._shape = inside.shape
        self._in_rows = inside.flatten().nonzero().squeeze(1).to(device)
        self._row_ids, self._columns = row_ids.to(device), columns[inside].to(device)
        self.positions = (starts + columns)[inside].to(device)
        """[N] position of each new token in its sequence."""
        self.last = (new.cumsum(0) - 1).to(device)
        """[R] index of each row's last new token among the N."""
        self._biases: dict[tuple[int | None, bool], Tensor] = {}

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
        keys[self._row_ids, self._columns] = key
        values[self._row_ids, self._columns] = value
        keys, values = keys[self._here, : self._width], values[self._here, : self._width]
        if window is not None and window >= self._longest:
            window = None
        is_decoding = self._shape[1] == 1
        if self._groups is not None and is_decoding and window is None:
            bias = self._bias(query.dtype, None, is_gathered=False)
            return self._groups.attend(layer, query, keys, values, bias, scale)
        if self._groups is not None:
            keys, values = self._groups.gathered(layer, keys, values)
        if not is_decoding:
            room = query.new_zeros(self._shape.numel(), *query.shape[1:])
            query = room.index_copy_(0, self._in_rows, query)
        bias = None  # causal
        if not self._is_first or window is not None:
            bias = self._bias(query.dtype, window, is_gathered=self._groups is not None)
        output = attend_in_rows(
            query.unflatten(0, self._shape), keys, values, mask=bias, scale=scale
        ).flatten(0, 1)
        return output if is_decoding else output.index_select(0, self._in_rows)

    def keep_routing(self, experts: Tensor) -> None:
        """Keep the experts [N, L, E] of the new tokens, as the layers keep keys and values."""
        kept, _ = self._cache.layer(ROUTING, self._width, experts, experts[:, :0])
        kept[self._row_ids, self._columns] = experts

    def commit(self) -> None:
        """Count the new tokens as cached, after every layer has stored its keys and values."""
        for row, count in zip(self._rows, self._num_new, strict=True):
            self._cache.lengths[row] += count

    def _bias(self, dtype: torch.dtype, window: int | None, is_gathered: bool) -> Tensor:
        """[R, 1, Q, columns] what is added to scores; made once, and the same in every layer."""
        made = self._biases.get((window, is_gathered))
        if made is not None:
            return made
        offset = torch.arange(self._width, device=self._starts.device)
        places = self._starts + offset  # [R, W] position of what each column holds
        if is_gathered and self._groups is not None:
            shared = torch.arange(self._groups.width, device=offset.device)
            never = torch.iinfo(shared.dtype).max
            places = torch.cat([torch.where(shared < self._starts, shared, never), places], 1)
        query, key = self._places[:, :, None], places[:, None]
        is_seen = key <= query
        if window is not None:
            is_seen &= key > query - window
        made = torch.zeros(is_seen.shape, dtype=dtype, device=offset.device)
        made = made.masked_fill_(~is_seen, -torch.inf).unsqueeze(1)
        self._biases[window, is_gathered] = made
        return made
