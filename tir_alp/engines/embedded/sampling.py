"""Draws tokens, keyed by sequence and position, with the logprobs of what was drawn from. Pure."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def draws(seed: int, sequence_uid: int, start: int, count: int) -> np.ndarray:
    """Uniform numbers in [0, 1) for the positions [start, start + count) of a sequence.

    They are a function of (seed, sequence, position) alone, by the counter-based generator Philox.
    """
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, sequence_uid], np.uint64)))
    return generator.random(start + count)[start:]


def sample(
    logits: Tensor, temperature: Tensor, top_p: Tensor, uniform: Tensor
) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverting the cumulative distribution.

    Args:
        logits: [R, V] float32.
        temperature: [R]; 0 is greedy.
        top_p: [R] in (0, 1].
        uniform: [R] float64 in [0, 1).

    Returns:
        Token ids [R], and their logprobs [R] float32 under the distribution drawn from, that is
        after temperature and truncation; 0 for greedy rows, which have only one outcome.
    """
    greedy = temperature == 0
    divisor = torch.where(greedy, 1.0, temperature)
    if bool((divisor != 1).any()):
        logits = logits / divisor[:, None]
    logprobs = torch.log_softmax(logits, dim=-1)
    if bool((top_p < 1).any()):
        logprobs = _truncate(logprobs, top_p)
    if bool(greedy.any()):
        best = torch.zeros_like(logprobs, dtype=torch.bool)
        best.scatter_(1, logits.argmax(-1, keepdim=True), True)
        point = torch.where(best, 0.0, -torch.inf)
        logprobs = torch.where(greedy[:, None], point, logprobs)
    cumulative = logprobs.exp().cumsum(-1, dtype=torch.float64)
    threshold = (uniform * cumulative[:, -1]).unsqueeze(1)
    # right=True: the first token whose cumulative probability exceeds the draw; its own is > 0.
    token_ids = torch.searchsorted(cumulative, threshold, right=True).clamp_max_(
        logits.shape[1] - 1
    )
    return token_ids.squeeze(1), logprobs.gather(1, token_ids).squeeze(1)


def _truncate(logprobs: Tensor, top_p: Tensor) -> Tensor:
    """Keep the most probable tokens that together reach `top_p`, at least one; renormalise."""
    ordered, order = logprobs.sort(dim=-1, descending=True)
    before = ordered.exp().cumsum(-1) - ordered.exp()
    dropped = torch.zeros_like(logprobs, dtype=torch.bool)
    dropped.scatter_(1, order, before >= top_p[:, None])
    return torch.log_softmax(logprobs.masked_fill(dropped, -torch.inf), dim=-1)
