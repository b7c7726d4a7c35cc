"""What a method reads of the micro-batches of an update besides their forward: before it is made.

Everything here is a function of the weights at the start of the step and of all sequences of the
update, whatever micro-batch and rank they are in: selections, and baselines of tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tir_alp.algorithm.advantage import ADVANTAGES, Advantage
from tir_alp.algorithm.lookup import find
from tir_alp.algorithm.noise import name_hashes, nth_keys
from tir_alp.algorithm.presets import AlgorithmConfig, SelectionConfig
from tir_alp.algorithm.selections import SELECTIONS, Selection, TokenColumns
from tir_alp.algorithm.token_baselines import energies, token_advantages
from tir_alp.training.ranks import Ranks
from tir_alp.types import Batch


@dataclass(frozen=True, slots=True)
class Looked:
    """What the fixed policies say of a micro-batch: [B, T] each, on the device of the model."""

    batch: Batch
    """With proximal logprobs."""
    entropy: Tensor
    """Of the proximal policy, in nats."""
    collisions: Tensor
    """sum_v pi_v^2 of the proximal policy."""

    @classmethod
    def of(cls, batch: Batch, logprobs: Tensor, *found: Tensor) -> Looked:
        """Make it of what a forward returned: logprobs, entropies and perhaps collisions."""
        entropy, *collisions = found
        collision = collisions[0] if collisions else torch.zeros_like(entropy)
        return cls(replace(batch, proximal_logprobs=logprobs), entropy, collision)

    def at_version(self, version: int, logprobs: Tensor, *found: Tensor) -> Looked:
        """Return it with another forward's values for the tokens that a version sampled."""
        batch, other = self.batch, Looked.of(self.batch, logprobs, *found)
        assert batch.versions is not None and batch.proximal_logprobs is not None
        its = batch.versions == version
        return Looked(
            replace(batch, proximal_logprobs=logprobs.where(its, batch.proximal_logprobs)),
            other.entropy.where(its, self.entropy),
            other.collisions.where(its, self.collisions),
        )


def versions_of(batch: Batch) -> set[int]:
    """Return the policy versions that sampled the loss tokens of a micro-batch."""
    assert batch.versions is not None
    return set(batch.versions[batch.loss_mask].unique().tolist())


def interpolated(batch: Batch, step: int) -> Batch:
    """Return a batch whose proximal logprobs are interpolated (A-3PO, 2512.06547).

    The policy at the start of the step lies between the one that sampled a token, d steps before,
    and the one after the step. So its logprob is taken to be at d / (d + 1) of the way.
    """
    assert batch.versions is not None
    age = (step - batch.versions).clamp(min=0).float()
    return replace(batch, interpolation=age / (age + 1))


def needs_collisions(algorithm: AlgorithmConfig) -> bool:
    """Whether the preparation reads the collision probabilities of the proximal policy."""
    return find(algorithm.advantage, ADVANTAGES, Advantage).token_baseline != "none"


def prepare(
    looked: Sequence[Looked], algorithm: AlgorithmConfig, ranks: Ranks, update: int
) -> list[Batch]:
    """Return the micro-batches of this rank with what the method reads; call on every rank.

    Args:
        looked: The micro-batches of this rank, and what the proximal policy says of them.
        algorithm: The method.
        ranks: The processes that train together.
        update: Number of the update; random selections depend on it.
    """
    batches = [each.batch for each in looked]
    if algorithm.selection is not None:
        selected = _selected(looked, algorithm.selection, ranks, update)
        batches = [
            replace(batch, selected=each) for batch, each in zip(batches, selected, strict=True)
        ]
    kind = find(algorithm.advantage, ADVANTAGES, Advantage).token_baseline
    if kind == "none":
        return batches
    collisions = [each.collisions for each in looked]
    advantages = _by_token(batches, collisions, ranks, count_all=kind == "position")
    return [
        replace(batch, token_advantages=each)
        for batch, each in zip(batches, advantages, strict=True)
    ]


# ------------------------------------------------------------------------------------- selections


def _selected(
    looked: Sequence[Looked], how: SelectionConfig, ranks: Ranks, update: int
) -> list[Tensor]:
    columns = [_columns(each, update) for each in looked]
    own = torch.cat(columns, dim=1) if columns else torch.zeros(5, 0, dtype=torch.float64)
    everywhere = ranks.gather(own)
    start = sum(each.shape[1] for each in everywhere[: ranks.rank])
    proximal, rollout, entropy, advantages, order = torch.cat(everywhere, dim=1)
    tokens = TokenColumns(proximal, rollout, entropy, advantages, order.view(torch.int64))
    found = torch.zeros(len(proximal), dtype=torch.bool)
    if len(proximal):
        found = find(how.type, SELECTIONS, Selection).function(tokens, how)
    rows = []
    for each in looked:
        mask = each.batch.loss_mask.cpu()
        stop = start + int(mask.sum())
        row = torch.zeros(mask.shape, dtype=torch.bool).masked_scatter(mask, found[start:stop])
        rows.append(row.to(each.batch.loss_mask.device))
        start = stop
    return rows


def _columns(looked: Looked, update: int) -> Tensor:
    """Return [5, N] float64: the columns of `TokenColumns`; the last one holds bits of int64."""
    batch = looked.batch
    mask = batch.loss_mask.cpu()
    assert batch.proximal_logprobs is not None
    streams = name_hashes(f"selection/{update}/{uid}" for uid in batch.sequence_uids)
    order = nth_keys(streams[:, None], torch.arange(mask.shape[1])[None])
    wide = batch.advantages[:, None] if batch.token_advantages is None else batch.token_advantages
    values = (batch.proximal_logprobs, batch.rollout_logprobs, looked.entropy, wide)
    columns = [each.expand(mask.shape).cpu()[mask].double() for each in values]
    return torch.stack([*columns, order[mask].view(torch.float64)])


# ------------------------------------------------------------------------------ baselines of tokens


def _by_token(
    batches: Sequence[Batch], collisions: Sequence[Tensor], ranks: Ranks, *, count_all: bool
) -> list[Tensor]:
    """Return the advantage of each token, by micro-batch: [B, T] float32."""
    groups: dict[int, dict[int, tuple[float, Tensor, Tensor]]] = defaultdict(dict)
    own: list[tuple[int, int, float, Tensor, Tensor]] = []
    for batch, collision in zip(batches, collisions, strict=True):
        assert batch.prompts is not None and batch.proximal_logprobs is not None
        for row, uid in enumerate(batch.sequence_uids):
            mask = batch.loss_mask[row]
            energy = energies(batch.proximal_logprobs[row][mask], collision[row][mask]).cpu()
            places = mask.nonzero().flatten().cpu() - batch.prompts.lengths[row]
            numbers = places if count_all else torch.arange(len(places))
            value = float(batch.advantages[row])
            own.append((batch.prompts.uids[row], uid, value, energy, numbers))
    everywhere = [each for of_rank in ranks.gather(own) for each in of_rank]
    for group, uid, value, energy, numbers in everywhere:
        if len(numbers):  # a rank without a sequence of its own has one without loss tokens
            groups[group][uid] = (value, energy, numbers)
    found: dict[int, Tensor] = {}
    for members in groups.values():
        returns, energy, numbers = map(list, zip(*members.values(), strict=True))
        found |= dict(zip(members, token_advantages(returns, energy, numbers), strict=True))
    rows = []
    for batch in batches:
        values = torch.zeros(batch.loss_mask.shape, device=batch.loss_mask.device)
        for row, uid in enumerate(batch.sequence_uids):
            if batch.loss_mask[row].any():
                chosen = found[uid].to(values)
                values[row] = values[row].masked_scatter(batch.loss_mask[row], chosen)
        rows.append(values)
    return rows
