"""Gaussian noise as a pure function of a name, a position and a channel.

It consists of integer operations and one table lookup, so it is the same on every device, in every
batch and at every recomputation, and there is no state to save.

SplitMix64 (Steele, Lea, Flood 2014) advances a 64-bit counter by an odd constant and scrambles it
to get a random word. It is used twice: the key of a stream and a position give the key of a token;
the key of a token and the index of a word give four 16-bit indices into a table of pairs of
Gaussian quantiles, for eight channels.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


def _signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word


_STEP = _signed(0x9E3779B97F4A7C15)
_MULTIPLIERS = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)
_LATTICE = 27549


def name_hashes(names: Iterable[str]) -> Tensor:
    """Return [B] int64, one 64-bit hash per name."""
    digests = (hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names)
    return torch.tensor([int.from_bytes(each, "little", signed=True) for each in digests])


def nth_keys(keys: Tensor, numbers: Tensor) -> Tensor:
    """Return the keys of numbered items, e.g. of the tokens of a stream.

    Args:
        keys: int64, key of the stream or other parent of each item.
        numbers: int64, number of each item; its shape broadcasts with that of `keys`.
    """
    return _scramble(keys + numbers * _STEP)


def normal(token_keys: Tensor, num_channels: int) -> Tensor:
    """Return standard normal noise [N, num_channels] float32, one row per key of `token_keys`."""
    return torch.cat([noise for _, noise in normal_pieces(token_keys, num_channels)])


def normal_pieces(token_keys: Tensor, num_channels: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield the rows of `normal` in pieces, each as a slice of the rows and their noise.

    On a CPU the pieces are so small that the work stays in the cache, and mostly on one thread:
    waking threads for a hundred short operations is expensive on a busy machine.
    """
    device = token_keys.device
    num_words = -(-num_channels // 8)
    counters = torch.arange(num_words, device=device) * _STEP
    pairs = _normal_pairs(device)
    num_at_once = max(1, (1 << 15 if device.type == "cpu" else 1 << 22) // num_words)
    for start in range(0, len(token_keys), num_at_once):
        piece = slice(start, start + num_at_once)
        words = _scramble(token_keys[piece, None] + counters)
        indices = words.view(torch.uint16).to(torch.int32)
        noise = pairs.index_select(0, indices.flatten()).view(torch.float32)
        yield piece, noise.view(-1, num_words * 8)[:, :num_channels]


def _scramble(words: Tensor) -> Tensor:
    """Apply SplitMix64's finaliser in place on int64; every input bit affects every output bit."""
    _xor_shift(words, 30).mul_(_MULTIPLIERS[0])
    _xor_shift(words, 27).mul_(_MULTIPLIERS[1])
    return _xor_shift(words, 31)


def _xor_shift(words: Tensor, shift: int) -> Tensor:
    high_bits = words.bitwise_right_shift(shift).bitwise_and_((1 << (64 - shift)) - 1)
    return words.bitwise_xor_(high_bits)


@functools.cache
def _normal_pairs(device: torch.device) -> Tensor:
    """Return [65536] int64, each of which holds a pair of float32 quantiles of N(0, 1).

    Either half of the pairs contains every quantile once. The quantiles are those at
    (i + 1/2) / 65536, scaled to variance exactly 1: a step function in place of the Gaussian, whose
    distribution function is off by at most 2^-17; no value exceeds 4.4. The pairs are the points of
    a rank-1 lattice, which fills the unit square far more evenly than random points. Of all odd
    multipliers, this is one of those that come closest to independence: the correlation of a pair
    is 2e-5, and the distribution function of any linear combination is off by less than 6e-4.
    """
    index = torch.arange(1 << 16)
    quantiles = torch.special.ndtri((index.double() + 0.5) / (1 << 16))
    quantiles = (quantiles / quantiles.square().mean().sqrt()).float()
    pairs = torch.stack([quantiles, quantiles[index * _LATTICE % (1 << 16)]], dim=-1)
    return pairs.view(torch.int64).squeeze(-1).to(device)
