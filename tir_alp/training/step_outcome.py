"""Puts together what a trainer reports of a step, from what its updates have left."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch

from tir_alp.algorithm.advantage import ADVANTAGES, Advantage
from tir_alp.algorithm.lookup import find
from tir_alp.algorithm.presets import AlgorithmConfig
from tir_alp.algorithm.ratio_metrics import mismatch_metrics
from tir_alp.algorithm.ratio_summary import summarise
from tir_alp.training.micro_batch import loss_inputs
from tir_alp.training.packed_sequence import packed_sequences
from tir_alp.training.ranks import Ranks
from tir_alp.training.step_metrics import (
    MadeUpdate,
    metrics_of_updates,
    over_ranks,
    share_of_shared_tokens,
)
from tir_alp.training.step_report import StepReport, UpdateRecord, join_ranks
from tir_alp.types import Batch


def report_of(
    ranks: Ranks,
    micro_batches: Sequence[Sequence[Batch]],
    outcomes: Sequence[MadeUpdate | None],
    first: int,
    algorithm: AlgorithmConfig,
    state: Mapping[str, float],
) -> StepReport:
    """Return the report of a step; call on every rank.

    Args:
        ranks: The processes that train together.
        micro_batches: Those of this rank by update, as they were before the first one.
        outcomes: By update; None: it was not made.
        first: Number of updates of the run before this step.
        algorithm: The method.
        state: Metrics of the trainer's own state.
    """
    made = [outcome for outcome in outcomes if outcome is not None]
    every = [batch for batches in micro_batches for batch in batches]
    metrics = {**metrics_of_updates(ranks, made), **state}
    if algorithm.needs_proximal and every:
        mismatch = [summarise(loss_inputs(batch, batch.proximal_logprobs)) for batch in every]
        metrics |= mismatch_metrics(over_ranks(ranks, mismatch))
    metrics["train/shared_tokens"] = share_of_shared_tokens(ranks, every)
    metrics["train/skipped_updates"] = len(outcomes) - len(made)
    num_tokens = torch.tensor(sum(batch.num_loss_tokens for batch in every))
    metrics["tokens/loss"] = int(ranks.sum(num_tokens))
    by_turn = find(algorithm.advantage, ADVANTAGES, Advantage).by_turn is not None
    records = [
        UpdateRecord(
            update=first + index,
            made=outcome is not None,
            sequences=tuple(
                each for batch in batches for each in packed_sequences(batch, by_turn=by_turn)
            ),
        )
        for index, (batches, outcome) in enumerate(zip(micro_batches, outcomes, strict=True))
    ]
    values = ranks.gather([each for update in made for each in update.values])
    return StepReport(metrics, join_ranks(ranks.gather(records)), tuple(itertools.chain(*values)))
