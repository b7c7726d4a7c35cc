"""Attention of the rows of a decode step to the beginnings that they share.

Rows with the same prefix ask it together, and the prefixes of a stack are asked in one call: a step
of a small model takes as long as its number of calls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tir_alp.engines.embedded.prefix import Prefix, PrefixStack


class PrefixGroups:
    """The rows of a forward that have a prefix, by prefix.

    Args:
        prefixes: [R] the prefix of each row, if it has one.
        device: Device of the forward.
    """

    def __init__(self, prefixes: Sequence[Prefix | None], device: torch.device) -> None:
        self._members: dict[Prefix, list[int]] = {}
        for row, prefix in enumerate(prefixes):
            if prefix is not None:
                self._members.setdefault(prefix, []).append(row)
        of_stacks: dict[PrefixStack, dict[int, list[int]]] = {}
        for prefix, rows in self._members.items():
            assert prefix.stack is not None
            of_stacks.setdefault(prefix.stack, {})[prefix.place] = rows
        self._asked = [
            each for stack, rows in of_stacks.items() for each in _asked(stack, rows, device)
        ]
        order = [row for asked in self._asked for row in asked.rows]
        self._order = torch.tensor(order, device=device)
        self._are_all = order == [*range(len(prefixes))]
        self.width = max(map(len, self._members))
        """Tokens of the longest prefix."""

    def attend(
        self,
        layer: int,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        bias: Tensor,
        scale: float | None,
    ) -> Tensor:
        """Attend from one token per row to its row and its prefix, which is read once per group.

        Attention to each of the two is a mean of values, weighted by their exponential scores, and
        so is the mean of both.

        Args:
            layer: Index of the layer.
            query: [R, heads, D].
            keys: [R, W, key heads, D] those of the rows.
            values: As `keys`.
            bias: [R, 1, 1, W] what is added to the scores of a row.
            scale: Factor of the scores; None: that of the dimension.

        Returns:
            [R, heads, D].
        """
        by_head = query.unflatten(1, (keys.shape[2], -1))  # [R, key heads, heads of each, D]
        output, total = _attention(
            by_head, keys.transpose(1, 2), values.transpose(1, 2), bias, scale
        )
        found = [each.attend(layer, by_head, scale) for each in self._asked]
        shared, shared_total = (torch.cat(each) for each in zip(*found, strict=True))
        own = output
        if not self._are_all:
            own, total = output[self._order], total[self._order]
        weight = torch.sigmoid(shared_total - total).unsqueeze(-1)
        both = torch.lerp(own.to(weight.dtype), shared.to(weight.dtype), weight).to(output.dtype)
        if not self._are_all:
            both = output.index_copy(0, self._order, both)
        return both.flatten(1, 2)

    def gathered(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        """Return keys and values [R, prefix + W, key heads, D], with a copy of each prefix."""
        both = []
        for index, own in enumerate((keys, values)):
            room = own.new_zeros(len(own), self.width + own.shape[1], *own.shape[2:])
            room[:, self.width :] = own
            for prefix, rows in self._members.items():
                room[rows, : len(prefix)] = prefix.states(layer)[index]
            both.append(room)
        return tuple(both)


class _Asked:
    """Consecutive prefixes of a stack that are asked in one call, and the rows that ask.

    Axis letters: P prefixes, S tokens of the longest, M rows of the one that has most, K key heads,
    G query heads of each.

    Args:
        stack: The stack.
        places: The prefixes.
        members: Rows by prefix; a prefix may have none.
        device: Device of the forward.
    """

    def __init__(
        self,
        stack: PrefixStack,
        places: range,
        members: Mapping[int, list[int]],
        device: torch.device,
    ) -> None:
        self._stack, self._places = stack, slice(places.start, places.stop)
        lengths = [stack.lengths[place] for place in places]
        self._width = max(lengths)
        of_each = [members.get(place, []) for place in places]
        most = max(map(len, of_each))
        self.rows = [row for rows in of_each for row in rows]
        """[R'] in the order of the outputs."""
        # Any row does for a place that none fills: its output is dropped.
        asking = [rows + self.rows[:1] * (most - len(rows)) for rows in of_each]
        self._asking = torch.tensor(asking, device=device)
        kept = [most * n + m for n, rows in enumerate(of_each) for m in range(len(rows))]
        self._kept = None
        if len(kept) < most * len(places):
            self._kept = torch.tensor(kept, device=device)
        self._is_hidden, self._bias = None, None
        if min(lengths) < self._width:
            offset = torch.arange(self._width, device=device)
            is_hidden = offset >= torch.tensor(lengths, device=device)[:, None]
            self._is_hidden = is_hidden[:, None, None]

    def attend(self, layer: int, by_head: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
        """Attend from `by_head` [R, K, G, D].

        Returns:
            [R', K, G, D], and the log of the sum of the exponential scores [R', K, G].
        """
        key, value = (
            each[self._places, : self._width].transpose(1, 2) for each in self._stack.states[layer]
        )
        queries = by_head[self._asking].transpose(1, 2)  # [P, K, M, G, D]
        if self._is_hidden is not None and self._bias is None:  # the same in every layer
            self._bias = torch.zeros_like(self._is_hidden, dtype=by_head.dtype)
            self._bias.masked_fill_(self._is_hidden, -torch.inf)
        found = _attention(queries.flatten(2, 3), key, value, self._bias, scale)
        output, total = (
            each.unflatten(2, queries.shape[2:4]).transpose(1, 2).flatten(0, 1) for each in found
        )
        return (output, total) if self._kept is None else (output[self._kept], total[self._kept])


def _asked(
    stack: PrefixStack, members: Mapping[int, list[int]], device: torch.device
) -> list[_Asked]:
    """Ask a whole stack if at least half of its prefixes are asked, else each of these alone."""
    if 2 * len(members) >= len(stack.lengths):
        return [_Asked(stack, range(len(stack.lengths)), members, device)]
    return [_Asked(stack, range(place, place + 1), members, device) for place in members]


def _attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Attention [B, heads, Q, D], and the log of the sum of each query's exponential scores."""
    if query.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, attn_mask=bias, scale=scale
        )
    scores = query.float() @ key.float().transpose(2, 3)
    scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores if bias is None else scores + bias
    return (scores.softmax(-1) @ value.float()).to(query.dtype), scores.logsumexp(-1)
