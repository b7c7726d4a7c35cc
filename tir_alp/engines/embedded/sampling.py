"""Draws tokens, keyed by sequence and position, with the logprobs of what was drawn from. Pure."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK = 64  # tokens whose probabilities are added up before any of them is looked at


def draws(seed: int, sequence_uid: int, start: int, count: int) -> np.ndarray:
    """Uniform numbers in [0, 1) for the positions [start, start + count) of a sequence.

    They are a function of (seed, sequence, position) alone, by the counter-based generator Philox.
    """
    bits = np.random.Philox(key=np.array([seed, sequence_uid], np.uint64))
    steps, skipped = divmod(start, 4)  # each step of the counter makes four numbers
    return np.random.Generator(bits.advance(steps)).random(skipped + count)[skipped:]


def sample(
    logits: Tensor, temperature: Tensor, top_p: Tensor, uniform: Tensor
) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverting the cumulative distribution.

    Args:
        logits: [R, V] float32.
        temperature: [R], on the CPU as all settings; 0 is greedy.
        top_p: [R] in (0, 1].
        uniform: [R] float64 in [0, 1).

    Returns:
        Token ids [R], and their logprobs [R] float32 under the distribution drawn from, that is
        after temperature and truncation; 0 for greedy rows, which have only one outcome. On the
        device of the logits.
    """
    device, is_greedy = logits.device, temperature == 0
    divisor = torch.where(is_greedy, 1.0, temperature)
    if bool((divisor != 1).any()):
        logits = logits / divisor[:, None].to(device)
    weights = torch.softmax(logits, dim=-1)
    if bool((top_p < 1).any()):
        rows = (top_p < 1).nonzero().squeeze(1)
        weights[rows.to(device)] = _truncated(
            weights[rows.to(device)], top_p[rows, None].to(device)
        )
    token_ids, logprobs = _inverted(weights, uniform[:, None].to(device))
    if bool(is_greedy.any()):
        is_greedy = is_greedy.to(device)
        token_ids = torch.where(is_greedy, logits.argmax(-1), token_ids)
        logprobs = torch.where(is_greedy, 0.0, logprobs)
    return token_ids, logprobs


def _inverted(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the cumulative weights [R, V] pass a share [R, 1], and that token's logprob.

    Only the sums of blocks are accumulated, in float64, and then the weights of one block.
    """
    blocks = F.pad(weights, (0, -weights.shape[1] % _BLOCK)).unflatten(1, (-1, _BLOCK))
    sums = blocks.sum(-1).double()
    until = sums.cumsum(-1)
    total = until[:, -1:]
    threshold = _below(uniform * total, total)
    # right=True: the first whose cumulative weight exceeds the draw; its own weight is > 0.
    block = torch.searchsorted(until, threshold, right=True)
    inside = blocks.gather(1, block[..., None].expand(-1, 1, _BLOCK)).squeeze(1)
    cumulative = inside.cumsum(-1, dtype=torch.float64)
    threshold = (threshold - (until - sums).gather(1, block)).clamp_min(0)
    index = torch.searchsorted(cumulative, _below(threshold, cumulative[:, -1:]), right=True)
    logprobs = (inside.gather(1, index) / total).log()
    return (block * _BLOCK + index).squeeze(1), logprobs.squeeze(1).float()


def _below(values: Tensor, bound: Tensor) -> Tensor:
    """Rounding can take a value up to its bound, or further; return values that are below it."""
    return torch.minimum(values, torch.nextafter(bound, torch.zeros_like(bound)))


def _truncated(weights: Tensor, top_p: Tensor) -> Tensor:
    """Keep the most probable tokens that together reach `top_p`, at least one; others get 0."""
    ordered, order = weights.sort(dim=-1, descending=True)
    kept = ordered.cumsum(-1) - ordered < top_p
    return torch.zeros_like(weights).scatter_(1, order, ordered * kept)
