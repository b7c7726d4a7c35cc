"""What the trainer reports of each sequence that it packed, so that an audit can check it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from tir_alp.training.samples import advantages_by_token
from tir_alp.types import Batch, Sample


@dataclass(frozen=True, slots=True)
class PackedSequence:
    """One sequence of an update, as the loss got it."""

    uid: int
    """Identity of the sequence within the run."""
    num_tokens: int
    num_loss_tokens: int
    advantage: float
    """Its advantage, rounded to float32."""
    digest: str
    """64 bits in hexadecimal, of token ids, loss mask, turn ids, the rollout logprobs of the loss
    tokens, and the weight if it is not 1."""
    turn_advantages: tuple[float, ...] = ()
    """Advantage of each turn with loss tokens, rounded to float32; empty: all are `advantage`. A
    turn whose tokens differed would have several."""


def packed_sequences(batch: Batch, *, by_turn: bool = False) -> Iterator[PackedSequence]:
    """Describe each sequence of a micro-batch.

    Args:
        batch: The micro-batch.
        by_turn: Whether its advantages by token are those of turns, which follow from rewards. What
            else they can be depends on the policy, and is not described.
    """
    wide = batch.token_advantages if by_turn else None
    by_token = None if wide is None else wide.cpu().numpy()
    mask = batch.loss_mask.cpu().numpy()
    logprobs = batch.rollout_logprobs.cpu().numpy()
    turn_ids = batch.turn_ids.cpu().numpy()
    token_ids = np.split(batch.token_ids.cpu().numpy(), np.cumsum(batch.lengths)[:-1])
    for row, (uid, length) in enumerate(zip(batch.sequence_uids, batch.lengths, strict=True)):
        advantage = float(batch.advantages[row])
        yield PackedSequence(
            uid=uid,
            num_tokens=length,
            num_loss_tokens=int(mask[row].sum()),
            advantage=advantage,
            digest=_digest(
                token_ids[row],
                mask[row, :length],
                logprobs[row, :length],
                turn_ids[row, :length],
                1.0 if batch.weights is None else float(batch.weights[row]),
            ),
            turn_advantages=()
            if by_token is None
            else _by_turn(advantage, by_token[row], turn_ids[row], mask[row]),
        )


def packed_sequence(sample: Sample) -> PackedSequence:
    """Return what `packed_sequences` must report of a sample."""
    trajectory = sample.trajectory
    mask = np.array(trajectory.loss_mask, bool)
    turn_ids = np.array(trajectory.turn_ids)
    advantage = float(np.float32(sample.advantage))
    by_token = np.array(advantages_by_token(sample), np.float32)
    return PackedSequence(
        uid=trajectory.sequence_uid,
        num_tokens=len(mask),
        num_loss_tokens=int(mask.sum()),
        advantage=advantage,
        digest=_digest(
            np.array(trajectory.token_ids),
            mask,
            np.array(trajectory.rollout_logprobs),
            turn_ids,
            sample.weight,
        ),
        turn_advantages=_by_turn(advantage, by_token, turn_ids, mask),
    )


def _by_turn(
    advantage: float, by_token: NDArray, turn_ids: NDArray, mask: NDArray
) -> tuple[float, ...]:
    """Return the advantages of loss tokens, once for each run of equal ones within a turn.

    It is empty if all of them have the advantage of the sequence.
    """
    pairs = zip(turn_ids[mask].tolist(), by_token[mask].tolist(), strict=True)
    found = tuple(each for (_, each), _ in groupby(pairs))
    return () if set(found) <= {advantage} else found


def _digest(
    token_ids: NDArray, mask: NDArray, logprobs: NDArray, turn_ids: NDArray, weight: float
) -> str:
    arrays = (
        token_ids.astype("<i4"),
        mask.astype("u1"),
        logprobs[mask].astype("<f4"),
        turn_ids.astype("<i4"),
    )
    data = b"".join(array.tobytes() for array in arrays)
    if weight != 1.0:
        data += np.float32(weight).tobytes()
    return hashlib.blake2b(data, digest_size=8).hexdigest()
