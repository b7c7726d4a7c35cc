"""Trajectories to packed micro-batches. Pure, and the one place where alignment is decided.

Position t of every row is about token t: its logprob is that of token t given what stands before
it, so what predicts it is the hidden state at t - 1 of the same sequence. No other module shifts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tir_alp.types import Batch, Trajectory


@dataclass(frozen=True, slots=True)
class Sample:
    """One trajectory with its advantage: what an update is made of."""

    trajectory: Trajectory
    advantage: float


def pack(samples: Sequence[Sample], max_tokens: int) -> list[Batch]:
    """Divide samples over micro-batches of at most `max_tokens` tokens, long ones first.

    Sequences of like length share a micro-batch, which wastes least in attention. A trajectory
    longer than `max_tokens` gets a micro-batch of its own; one without a token for the loss is left
    out, as it has no gradient. Every Batch is on the CPU.
    """
    useful = [sample for sample in samples if any(sample.trajectory.loss_mask)]
    useful.sort(key=lambda sample: len(sample.trajectory.token_ids), reverse=True)
    batches: list[list[Sample]] = []
    room = 0
    for sample in useful:
        length = len(sample.trajectory.token_ids)
        if length > room:
            batches.append([])
            room = max_tokens
        batches[-1].append(sample)
        room -= length
    return [collate(batch) for batch in batches]


def collate(samples: Sequence[Sample]) -> Batch:
    """Pack samples, in order, into one Batch."""
    trajectories = [sample.trajectory for sample in samples]
    lengths = tuple(len(trajectory.token_ids) for trajectory in trajectories)
    longest = max(lengths)
    return Batch(
        token_ids=torch.tensor([token for each in trajectories for token in each.token_ids]),
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        lengths=lengths,
        sequence_uids=tuple(trajectory.sequence_uid for trajectory in trajectories),
        loss_mask=_rows([each.loss_mask for each in trajectories], longest, False, torch.bool),
        rollout_logprobs=_rows(
            [each.rollout_logprobs for each in trajectories], longest, 0.0, torch.float32
        ),
        turn_ids=_rows([each.turn_ids for each in trajectories], longest, -1, torch.int64),
        advantages=torch.tensor([sample.advantage for sample in samples], dtype=torch.float32),
    )


def sequences_of(batch: Batch, rows: Sequence[int]) -> Batch:
    """The micro-batch of some of the sequences of another, given by ascending index."""
    parts = batch.token_ids.split(batch.lengths)
    positions = batch.position_ids.split(batch.lengths)

    def chosen(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[list(rows)]

    return replace(
        batch,
        token_ids=torch.cat([parts[row] for row in rows]),
        position_ids=torch.cat([positions[row] for row in rows]),
        lengths=tuple(batch.lengths[row] for row in rows),
        sequence_uids=tuple(batch.sequence_uids[row] for row in rows),
        loss_mask=batch.loss_mask[list(rows)],
        rollout_logprobs=batch.rollout_logprobs[list(rows)],
        turn_ids=batch.turn_ids[list(rows)],
        advantages=batch.advantages[list(rows)],
        proximal_logprobs=chosen(batch.proximal_logprobs),
        reference_logprobs=chosen(batch.reference_logprobs),
    )


def loss_positions(batch: Batch) -> Tensor:
    """[M] places in the packed tokens of those that enter the loss, in order.

    The hidden state that predicts the token at place i is at i - 1: a sequence begins with its
    prompt, so no token of the loss is the first of its sequence.
    """
    starts = torch.tensor(batch.lengths, device=batch.loss_mask.device).cumsum(0)
    starts = starts - starts.new_tensor(batch.lengths)
    rows, columns = batch.loss_mask.nonzero(as_tuple=True)
    return starts[rows] + columns


def to_rows(batch: Batch, values: Tensor) -> Tensor:
    """[M] values of the loss's tokens to [B, T], with 0 elsewhere."""
    rows = torch.zeros(batch.loss_mask.shape, dtype=values.dtype, device=values.device)
    return rows.masked_scatter(batch.loss_mask, values)


def _rows(
    rows: Sequence[Sequence[float]], width: int, padding: float, dtype: torch.dtype
) -> Tensor:
    return torch.tensor([[*row, *[padding] * (width - len(row))] for row in rows], dtype=dtype)
