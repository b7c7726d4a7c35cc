"""What a trainer reports of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tir_alp.training.packed_sequence import PackedSequence
from tir_alp.training.token_values import TokenValues


@dataclass(frozen=True, slots=True)
class UpdateRecord:
    """One optimizer update."""

    update: int
    """Number of updates of the run before this one."""
    made: bool
    """False: it was skipped."""
    sequences: tuple[PackedSequence, ...]
    """The sequences that the loss got, over all ranks."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """One training step, the same on every rank."""

    metrics: dict[str, float]
    updates: tuple[UpdateRecord, ...]
    """One record per update, in order."""
    values: tuple[TokenValues, ...] = ()
    """What the loss saw of each token, for as many sequences as are reported."""


def join_ranks(of_ranks: Sequence[Sequence[UpdateRecord]]) -> tuple[UpdateRecord, ...]:
    """Join the records that each rank made of its own share of the same updates.

    A rank without a sequence of its own packs one of another rank, without loss tokens: such
    sequences are left out.
    """
    return tuple(
        UpdateRecord(
            shares[0].update,
            shares[0].made,
            tuple(each for share in shares for each in share.sequences if each.num_loss_tokens),
        )
        for shares in zip(*of_ranks, strict=True)
    )
