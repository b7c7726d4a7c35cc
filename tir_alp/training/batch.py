"""Packs trajectories into micro-batches. Pure; only this module decides how tokens are aligned.

Position t of every row is about token t: its logprob is that of token t given the tokens before it,
so the hidden state at t - 1 of the same sequence predicts it. No other module shifts tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from tir_alp.algorithm.perturbation import NoiseKey
from tir_alp.training.samples import advantages_by_token
from tir_alp.types import Batch, Prompts, Sample, Trajectory


def pack(
    samples: Sequence[Sample],
    max_tokens: int,
    rank: int = 0,
    num_ranks: int = 1,
    *,
    share_prompts: bool = False,
    with_versions: bool = False,
    with_routing: bool = False,
) -> list[Batch]:
    """Return the micro-batches of one rank, on the CPU; every rank gets equally many.

    Bundles of samples are divided as in `divide`. A rank for which no sample is left gets one of
    another rank without loss tokens, because all ranks must take part in every forward and backward
    pass.

    Args:
        samples: All samples of the update, the same on every rank.
        max_tokens: Limit of a micro-batch, in tokens that its forward computes.
        rank: Index of the rank.
        num_ranks: Number of ranks.
        share_prompts: Whether what prompts of a group's samples begin with alike is computed once
            per micro-batch. Such samples are bundled.
        with_versions: Whether batches say which policy version sampled each token.
        with_routing: Whether batches say which experts computed each token in the engine.
    """
    useful = [sample for sample in samples if any(sample.trajectory.loss_mask)]
    bundles = [[sample] for sample in useful]
    if share_prompts:
        bundles = [*_bundles(useful, max_tokens, num_ranks)]
    rounds = divide([_num_computed(bundle) for bundle in bundles], max_tokens, num_ranks)
    batches = []
    for shares in rounds:
        chosen = [sample for index in shares[rank] for sample in bundles[index]]
        batch = collate(
            chosen or bundles[shares[0][-1]][:1],
            share_prompts=share_prompts,
            with_versions=with_versions,
            with_routing=with_routing,
        )
        batches.append(batch if chosen else without_loss(batch))
    return batches


def without_loss(batch: Batch) -> Batch:
    """Return a batch none of whose tokens enters the loss."""
    none = torch.zeros(0, dtype=torch.int64)
    return replace(batch, loss_mask=batch.loss_mask & False, loss_positions=none)


def _bundles(samples: Sequence[Sample], max_tokens: int, num_ranks: int) -> Iterator[list[Sample]]:
    """Yield samples whose prompts begin alike, as many as a micro-batch can hold.

    With several ranks a bundle has at most a rank's share of all tokens, so that none is idle
    because another one has a whole group.
    """
    groups: dict[int, list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[sample.trajectory.group_id].append(sample)
    # Sorted by prompt, each has the longest beginning in common with the one before it.
    ordered = [
        sorted(members, key=lambda each: (_prompt(each), -len(each.trajectory.token_ids)))
        for members in groups.values()
    ]
    limit = min(max_tokens, sum(map(_num_computed, ordered)) / num_ranks)
    for members in ordered:
        bundle: list[Sample] = []
        num_tokens = 0
        for sample in members:
            length = len(sample.trajectory.token_ids)
            shared = num_in_common(_prompt(bundle[-1]), _prompt(sample)) if bundle else 0
            if bundle and (shared == 0 or num_tokens + length - shared > limit):
                yield bundle
                bundle, num_tokens, shared = [], 0, 0
            bundle.append(sample)
            num_tokens += length - shared
        yield bundle


def _prompt(sample: Sample) -> tuple[int, ...]:
    return sample.trajectory.prompt.token_ids


def _num_computed(bundle: Sequence[Sample]) -> int:
    """Number of tokens of samples of a group, sorted by prompt: what two share is counted once."""
    shared = sum(num_in_common(_prompt(one), _prompt(other)) for one, other in pairwise(bundle))
    return sum(len(each.trajectory.token_ids) for each in bundle) - shared


def divide(lengths: Sequence[int], max_tokens: int, num_ranks: int) -> list[list[list[int]]]:
    """Divide sequences over rounds, in each of which every rank has one micro-batch.

    Longer sequences come first, and each goes to the rank with the fewest tokens in the round
    (longest processing time first, Graham 1969). So the ranks of a round, which wait for one
    another, have similar numbers of tokens, and sequences of similar length share a micro-batch,
    which wastes least in attention. A sequence longer than `max_tokens` has a micro-batch of its
    own.

    Args:
        lengths: Number of tokens of each sequence.
        max_tokens: Limit of a micro-batch, in tokens.
        num_ranks: Number of micro-batches in a round.

    Returns:
        Indices of sequences, by round and rank; in the last round a rank may have none.
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


def collate(
    samples: Sequence[Sample],
    *,
    share_prompts: bool = False,
    with_versions: bool = False,
    with_routing: bool = False,
) -> Batch:
    """Pack samples into one batch, in order.

    Args:
        samples: At least one sample.
        share_prompts: Whether what prompts of a group's samples begin with alike is computed once.
        with_versions: Whether the batch says which policy version sampled each token.
        with_routing: Whether it says which experts computed each token in the engine.
    """
    trajectories = [sample.trajectory for sample in samples]
    lengths = tuple(len(trajectory.token_ids) for trajectory in trajectories)
    longest = max(lengths)
    masks = [np.array(each.loss_mask, bool) for each in trajectories]
    token_advantages = versions = None
    if any(sample.turn_advantages is not None for sample in samples):
        rows = [advantages_by_token(sample) for sample in samples]
        token_advantages = _rows(rows, longest, 0.0, torch.float32)
    weights = None
    if any(sample.weight != 1.0 for sample in samples):
        weights = torch.tensor([sample.weight for sample in samples], dtype=torch.float32)
    if with_versions:
        versions = _rows([_versions(each) for each in trajectories], longest, -1, torch.int64)
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
        loss_positions=torch.from_numpy(np.concatenate(masks).nonzero()[0]),
        weights=weights,
        prompts=_prompts(trajectories, share_prompts),
        token_advantages=token_advantages,
        versions=versions,
        routing=_routing(trajectories) if with_routing else None,
    )


def _prompts(trajectories: Sequence[Trajectory], share: bool) -> Prompts:
    """Say what of the prompts is computed once: with which earlier one each has most in common."""
    rows, shared = [*range(len(trajectories))], [0] * len(trajectories)
    known: dict[int, dict[tuple[int, ...], int]] = defaultdict(dict)  # group, prompt -> row
    for row, trajectory in enumerate(trajectories if share else ()):
        prompt, earlier = trajectory.prompt.token_ids, known[trajectory.group_id]
        if prompt in earlier:
            shared[row], rows[row] = len(prompt), earlier[prompt]
        else:
            found = ((num_in_common(prompt, each), -place) for each, place in earlier.items())
            number, place = max(found, default=(0, 0))
            shared[row], rows[row] = number, -place if number else row
            earlier[prompt] = row
    return Prompts(
        uids=tuple(trajectory.group_id for trajectory in trajectories),
        lengths=tuple(len(trajectory.prompt) for trajectory in trajectories),
        rows=tuple(rows),
        shared=tuple(shared),
    )


def _prompts_of(prompts: Prompts, rows: Sequence[int]) -> Prompts:
    """Return the prompts of some of the sequences, given by ascending indices."""
    chains = [_chain(prompts, row) for row in rows]
    first, shared = [], []
    for place, chain in enumerate(chains):
        common = ((_linked(chain, other), -n) for n, other in enumerate(chains[:place]))
        number, least = max(common, default=(0, 0))
        first.append(-least if number else place)
        shared.append(number)
    return Prompts(
        uids=tuple(prompts.uids[row] for row in rows),
        lengths=tuple(prompts.lengths[row] for row in rows),
        rows=tuple(first),
        shared=tuple(shared),
    )


def _chain(prompts: Prompts, row: int) -> dict[int, int]:
    """Return each sequence that a row shares tokens with by way of others, and how many."""
    chain = {row: prompts.lengths[row]}
    while prompts.rows[row] != row:
        number = min(chain[row], prompts.shared[row])
        row = prompts.rows[row]
        chain[row] = number
    return chain


def _linked(one: Mapping[int, int], other: Mapping[int, int]) -> int:
    """Return the number of tokens that two rows share, given by their chains."""
    return max((min(one[row], other[row]) for row in one.keys() & other.keys()), default=0)


def num_in_common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """Return the number of tokens that two sequences begin with alike."""
    length = min(len(one), len(other))
    if one[:length] == other[:length]:
        return length
    return int(np.argmin(np.equal(one[:length], other[:length])))


def _routing(trajectories: Sequence[Trajectory]) -> Tensor | None:
    """Return the experts of all packed tokens, -1 where the engine did not report them."""
    pieces = [trajectory.routing for trajectory in trajectories]
    known = next((each[0] for each in pieces if each), None)
    if known is None:
        return None
    rows = []
    for trajectory, own in zip(trajectories, pieces, strict=True):
        length = len(trajectory.token_ids)
        row = np.full((length, *known.shape[1:]), -1, np.int16)
        found = np.concatenate(own)[:length] if own else row[:0]
        row[: len(found)] = found
        rows.append(row)
    return torch.from_numpy(np.concatenate(rows))


def _versions(trajectory: Trajectory) -> list[int]:
    """Return the policy version that sampled each token, -1 where none did."""
    found = [-1] * len(trajectory.prompt)
    for turn in trajectory.turns:
        for span in turn.versions:
            found += [span.version] * (span.stop - span.start)
        found += [-1] * len(turn.observation)
    return found


def sequences_of(batch: Batch, rows: Sequence[int]) -> Batch:
    """Return a batch of some of the sequences of another, given by ascending indices."""
    token_ids = batch.token_ids.split(batch.lengths)
    positions = batch.position_ids.split(batch.lengths)
    routing = None if batch.routing is None else batch.routing.split(batch.lengths)

    def chosen(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[list(rows)]

    return replace(
        batch,
        token_ids=torch.cat([token_ids[row] for row in rows]),
        position_ids=torch.cat([positions[row] for row in rows]),
        lengths=tuple(batch.lengths[row] for row in rows),
        sequence_uids=tuple(batch.sequence_uids[row] for row in rows),
        prompts=None if batch.prompts is None else _prompts_of(batch.prompts, rows),
        loss_mask=batch.loss_mask[list(rows)],
        loss_positions=None,
        rollout_logprobs=batch.rollout_logprobs[list(rows)],
        turn_ids=batch.turn_ids[list(rows)],
        advantages=batch.advantages[list(rows)],
        weights=chosen(batch.weights),
        proximal_logprobs=chosen(batch.proximal_logprobs),
        reference_logprobs=chosen(batch.reference_logprobs),
        token_advantages=chosen(batch.token_advantages),
        selected=chosen(batch.selected),
        versions=chosen(batch.versions),
        interpolation=chosen(batch.interpolation),
        routing=None if routing is None else torch.cat([routing[row] for row in rows]),
    )


def noise_keys(batch: Batch, update: int) -> list[NoiseKey]:
    """Return the key of each sequence's noise in an update, given by its number."""
    prompts = batch.prompts
    columns = [batch.sequence_uids, *(() if prompts is None else (prompts.uids, prompts.lengths))]
    return [NoiseKey(update, *each) for each in zip(*columns, strict=True)]


def loss_positions(batch: Batch) -> Tensor:
    """Return the positions [M] of the loss tokens among the packed tokens, in order.

    The hidden state that predicts the token at position i is at i - 1: a sequence begins with its
    prompt, so no loss token is the first of its sequence.
    """
    if batch.loss_positions is not None:
        return batch.loss_positions
    starts = torch.tensor(batch.lengths, device=batch.loss_mask.device).cumsum(0)
    starts = starts - starts.new_tensor(batch.lengths)
    rows, columns = batch.loss_mask.nonzero(as_tuple=True)
    return starts[rows] + columns


def to_rows(batch: Batch, values: Tensor) -> Tensor:
    """Place values [M] of the loss tokens into rows [B, T] that are 0 elsewhere."""
    rows = torch.zeros(batch.loss_mask.shape, dtype=values.dtype, device=values.device)
    return rows.masked_scatter(batch.loss_mask, values)


def _rows(
    rows: Sequence[Sequence[float]], width: int, padding: float, dtype: torch.dtype
) -> Tensor:
    return torch.tensor([[*row, *[padding] * (width - len(row))] for row in rows], dtype=dtype)
