"""Tokens that several sequences begin with, whose keys and values are computed and held once.

A prefix lives as long as a sequence that runs, waits or is parked refers to it. It is never written
to after it has been read, so that sequences that continue it differently need no copy. Prefixes
that are read together lie in one tensor, because a step of a small model takes as long as its
number of calls: see `prefix_groups.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from torch import Tensor

from tir_alp.training.batch import num_in_common

Tokens = tuple[int, ...]
States = dict[int, tuple[Tensor, Tensor]]
"""Keys and values [T, heads, D] of consecutive tokens of one sequence, by layer."""

MIN_SHARED = 256
"""Tokens in common from which on a prefix is worth its own part of each attention. For fewer tokens
a row per sequence that repeats them is as fast: see docs/engines.md."""


MAX_STACKED = 8
"""Prefixes in one stack, whose memory is free only after the last of them has ended."""
_MAX_PADDING = 1.25
"""Tokens of a stack, relative to those of its prefixes."""


@dataclass(eq=False, slots=True)
class PrefixStack:
    """Keys and values of prefixes of about the same length, so that attention reads all at once."""

    lengths: tuple[int, ...]
    """[P] tokens of each prefix."""
    states: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """By layer: [P, S, heads, D], padded with zeros to the longest prefix."""

    @property
    def num_tokens(self) -> int:
        """Tokens that it takes the memory of."""
        return len(self.lengths) * max(self.lengths)

    def make_room(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Make the tensors of a layer, unless it has them, for states like these [T, heads, D]."""
        if layer not in self.states:
            room = (len(self.lengths), max(self.lengths))
            self.states[layer] = (
                key.new_zeros(*room, *key.shape[1:]),
                value.new_zeros(*room, *value.shape[1:]),
            )


@dataclass(eq=False, slots=True)
class Prefix:
    """Tokens that several sequences begin with."""

    token_ids: Tokens
    stack: PrefixStack | None = None
    """Where its keys and values are; None until a forward has read the tokens."""
    place: int = 0
    """Its index in the stack."""

    def __len__(self) -> int:
        return len(self.token_ids)

    def begins(self, token_ids: Tokens) -> bool:
        """Whether the sequence begins with it, and has a token left for a forward to read."""
        return len(self) < len(token_ids) and token_ids[: len(self)] == self.token_ids

    def keep(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Copy what a forward has read, [T, heads, D], into the stack."""
        assert self.stack is not None
        self.stack.make_room(layer, key, value)
        for own, read in zip(self.states(layer), (key, value), strict=True):
            own.copy_(read)

    def states(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values [T, heads, D] of a prefix that has been read."""
        assert self.stack is not None
        keys, values = self.stack.states[layer]
        return keys[self.place, : len(self)], values[self.place, : len(self)]


def to_stacks(prefixes: Iterable[Prefix]) -> list[list[Prefix]]:
    """Divide prefixes that are read together into those of each stack."""
    stacks: list[list[Prefix]] = []
    for prefix in sorted(prefixes, key=len, reverse=True):
        last = stacks[-1] if stacks else []
        padded = len(last[0]) * (len(last) + 1) if last else 0
        is_full = len(last) == MAX_STACKED
        if last and not is_full and padded <= _MAX_PADDING * (sum(map(len, last)) + len(prefix)):
            last.append(prefix)
        else:
            stacks.append([prefix])
    return stacks


def num_held(prefixes: Collection[Prefix]) -> int:
    """Return the tokens that prefixes take the memory of, once those that are new are read."""
    stacks = {prefix.stack for prefix in prefixes if prefix.stack is not None}
    new = to_stacks(prefix for prefix in prefixes if prefix.stack is None)
    return sum(each.num_tokens for each in stacks) + sum(len(each) * len(each[0]) for each in new)


def find_prefix(
    token_ids: Tokens, known: Iterable[Prefix], waiting: Iterable[Tokens]
) -> Prefix | None:
    """Find what a sequence that joins can share.

    Args:
        token_ids: Its tokens so far.
        known: Prefixes in use.
        waiting: Tokens of the sequences that are going to join after it.

    Returns:
        A known prefix, or one that has yet to be read, or None.
    """
    best = max((each for each in known if each.begins(token_ids)), key=len, default=None)
    longest = max((_num_common(token_ids, other) for other in waiting), default=0)
    if longest - (len(best) if best else 0) >= MIN_SHARED:
        return Prefix(token_ids[:longest])
    return best


def _num_common(one: Tokens, other: Tokens) -> int:
    """Number of tokens that two sequences can share; 0 if they are fewer than `MIN_SHARED`.

    Each of them has to read its last token itself, whose logits it is sampled from.
    """
    length = min(len(one), len(other)) - 1
    if length < MIN_SHARED or one[:MIN_SHARED] != other[:MIN_SHARED]:
        return 0
    return num_in_common(one[:length], other[:length])
