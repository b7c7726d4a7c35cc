"""Tokens that several sequences begin with, whose keys and values are computed and held once.

A prefix lives as long as a sequence that runs, waits or is parked refers to it. It is never written
to after it has been read, so that sequences that continue it differently need no copy.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

Tokens = tuple[int, ...]
States = dict[int, tuple[Tensor, Tensor]]
"""Keys and values [T, heads, D] of consecutive tokens of one sequence, by layer."""

MIN_SHARED = 256
"""Tokens in common from which on a prefix is worth its own part of each attention. For fewer tokens
a row per sequence that repeats them is as fast: see docs/engines.md."""


@dataclass(frozen=True, eq=False, slots=True)
class Prefix:
    """Tokens that several sequences begin with."""

    token_ids: Tokens
    states: States = field(default_factory=dict)
    """Empty until a forward has read the tokens."""

    def __len__(self) -> int:
        return len(self.token_ids)

    def begins(self, token_ids: Tokens) -> bool:
        """Whether the sequence begins with it, and has a token left for a forward to read."""
        return len(self) < len(token_ids) and token_ids[: len(self)] == self.token_ids


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
    if one[:length] == other[:length]:
        return length
    return int(np.argmin(np.equal(one[:length], other[:length])))
