"""Subtracts the baseline of VCPO, for which the gradient norm of every trajectory is needed.

Each sequence of an update has a forward and a backward pass of its own, one sequence after the
other over all ranks, because ranks that share the weights have to compute together. What follows
does not depend on ranks, micro-batches and their order. It is made anew for each update, with the
weights before it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tir_alp.algorithm.token_baselines import off_policy_baseline
from tir_alp.training.batch import sequences_of, without_loss
from tir_alp.training.ranks import Ranks
from tir_alp.types import Batch


@dataclass(frozen=True, slots=True)
class Score:
    """One sequence under the weights before an update."""

    log_ratio: float
    """Sum over its loss tokens of current minus rollout logprob, in nats."""
    norm: float
    """Norm over all ranks of the gradient of the sum of its logprobs."""


def with_gradient_baseline(
    batches: Sequence[Batch], ranks: Ranks, score: Callable[[Batch], Score]
) -> list[Batch]:
    """Return the micro-batches of this rank with advantages minus the baseline of their group.

    Args:
        batches: The micro-batches of this rank, at least one.
        ranks: The processes that train together; call on every rank.
        score: Makes the passes of a batch of one sequence; every rank takes part, those that do not
            have the sequence with one without loss tokens.
    """
    own = [
        (sequences_of(batch, [row]), batch.advantages[row].item())
        for batch in batches
        for row in range(len(batch.lengths))
        if batch.loss_mask[row].any()
    ]
    idle = without_loss(sequences_of(batches[0], [0]))
    found = []
    for rank, number in enumerate(ranks.gather(len(own))):
        for index in range(number):
            if rank != ranks.rank:
                score(idle)
                continue
            batch, advantage = own[index]
            each = score(batch)
            found.append((_group(batch, 0), advantage, each.log_ratio, each.norm))
    groups = defaultdict[int, list[tuple[float, float, float]]](list)
    for group, *values in (one for of_rank in ranks.gather(found) for one in of_rank):
        groups[group].append((values[0], values[1], values[2]))
    baselines = {
        group: off_policy_baseline(*map(list, zip(*members, strict=True)))
        for group, members in groups.items()
    }
    return [_minus(batch, baselines) for batch in batches]


def _group(batch: Batch, row: int) -> int:
    assert batch.prompts is not None
    return batch.prompts.uids[row]


def _minus(batch: Batch, baselines: dict[int, float]) -> Batch:
    wide = batch.token_advantages
    if wide is None:
        wide = batch.advantages[:, None].expand(batch.loss_mask.shape)
    rows = range(len(batch.lengths))
    own = [baselines.get(_group(batch, row), 0.0) for row in rows]
    return replace(batch, token_advantages=wide - wide.new_tensor(own)[:, None])
