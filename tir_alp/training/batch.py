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


def pack(
    samples: Sequence[Sample], max_tokens: int, rank: int = 0, num_ranks: int = 1
) -> list[Batch]:
    """The micro-batches of one rank, on the CPU; every rank gets equally many.

    They are those of `divide`. Where there is no sample left for a rank, it gets one that another
    has, without a token for the loss: a rank must not sit out what the others do together.
    """
    useful = [sample for sample in samples if any(sample.trajectory.loss_mask)]
    rounds = divide([len(each.trajectory.token_ids) for each in useful], max_tokens, num_ranks)
    batches = []
    for shares in rounds:
        batch = collate([useful[index] for index in shares[rank] or shares[0][-1:]])
        is_idle = not shares[rank]
        batches.append(replace(batch, loss_mask=batch.loss_mask & False) if is_idle else batch)
    return batches


def divide(lengths: Sequence[int], max_tokens: int, num_ranks: int) -> list[list[list[int]]]:
    """Divide sequences over ranks by rounds, in each of which a rank has one micro-batch.

    Long ones come first, and each goes to the rank that has least in its round (longest processing
    time first, Graham 1969): the ranks of a round, which wait for one another, have alike many
    tokens, and sequences of like length share a micro-batch, which wastes least in attention. One
    longer than `max_tokens` is alone in its micro-batch.

    Args:
        lengths: Tokens of each sequence.
        max_tokens: Of a micro-batch.
        num_ranks: Micro-batches of a round.

    Returns:
        Indices by round, rank and sequence; in the last rounds a rank may have none.
    """
    rounds: list[list[list[int]]] = []
    loads: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        least = min(range(len(loads)), key=loads.__getitem__, default=0)
        if not loads or (loads[least] and loads[least] + lengths[index] > max_tokens):
            rounds.append([[] for _ in range(num_ranks)])
            loads, least = [0] * num_ranks, 0
        rounds[-1][least].append(index)
        loads[least] += lengths[index]
    return rounds


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
