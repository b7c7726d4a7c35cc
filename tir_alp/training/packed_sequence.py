"""What the trainer reports of each sequence that it packed, so that an audit can check it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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


def packed_sequences(batch: Batch) -> Iterator[PackedSequence]:
    """Describe each sequence of a micro-batch."""
    mask = batch.loss_mask.cpu().numpy()
    logprobs = batch.rollout_logprobs.cpu().numpy()
    turn_ids = batch.turn_ids.cpu().numpy()
    token_ids = np.split(batch.token_ids.cpu().numpy(), np.cumsum(batch.lengths)[:-1])
    for row, (uid, length) in enumerate(zip(batch.sequence_uids, batch.lengths, strict=True)):
        yield PackedSequence(
            uid=uid,
            num_tokens=length,
            num_loss_tokens=int(mask[row].sum()),
            advantage=float(batch.advantages[row]),
            digest=_digest(
                token_ids[row],
                mask[row, :length],
                logprobs[row, :length],
                turn_ids[row, :length],
                1.0 if batch.weights is None else float(batch.weights[row]),
            ),
        )


def packed_sequence(sample: Sample) -> PackedSequence:
    """Return what `packed_sequences` must report of a sample."""
    trajectory = sample.trajectory
    mask = np.array(trajectory.loss_mask, bool)
    return PackedSequence(
        uid=trajectory.sequence_uid,
        num_tokens=len(mask),
        num_loss_tokens=int(mask.sum()),
        advantage=float(np.float32(sample.advantage)),
        digest=_digest(
            np.array(trajectory.token_ids),
            mask,
            np.array(trajectory.rollout_logprobs),
            np.array(trajectory.turn_ids),
            sample.weight,
        ),
    )


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
