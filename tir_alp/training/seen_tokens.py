"""Takes out of an update what its loss saw of each token.

Nothing here computes a forward: the values are those from which the loss was computed, and they
leave the device after its last micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from tir_alp.algorithm.levels import RATIO_LEVELS
from tir_alp.algorithm.loss import log_ratios
from tir_alp.algorithm.presets import AlgorithmConfig
from tir_alp.training.micro_batch import SeenBatch, loss_inputs, moved
from tir_alp.training.token_values import CLIPPED, TokenValues


def token_values(
    seen: Sequence[SeenBatch],
    clean: Sequence[SeenBatch],
    algorithm: AlgorithmConfig,
    update: int,
    most: int,
) -> tuple[TokenValues, ...]:
    """Return the values of the sequences of an update, in order, while they fit.

    Args:
        seen: The micro-batches of this rank, as the loss saw them.
        clean: The same without noise; empty: not measured.
        algorithm: The method.
        update: Number of updates of the run before this one.
        most: The largest number of loss tokens.
    """
    found: list[TokenValues] = []
    pairs = zip(seen, clean or [None] * len(seen), strict=True)
    for values in (each for batch, other in pairs for each in _of_batch(batch, other, algorithm)):
        most -= len(values.columns["logprob"])
        if most < 0:
            break
        found.append(replace(values, update=update))
    return tuple(found)


@torch.no_grad()
def _of_batch(
    seen: SeenBatch, clean: SeenBatch | None, algorithm: AlgorithmConfig
) -> Iterator[TokenValues]:
    batch = moved(seen.batch, torch.device("cpu"))
    inputs = loss_inputs(batch, seen.logprobs.cpu(), seen.entropy.cpu())
    ratios = log_ratios(inputs, algorithm)
    wide = {
        "logprob": inputs.logprobs,
        "log_ratio": ratios,
        "level_log_ratio": RATIO_LEVELS[algorithm.ratio_level].function(ratios, inputs),
        "entropy": inputs.entropy,
        "advantage": inputs.token_wise_advantages(),
        "proximal": inputs.proximal_logprobs,
        "reference": inputs.reference_logprobs,
        "clean": None if clean is None else clean.logprobs.cpu(),
    }
    columns = {name: each.float().numpy() for name, each in wide.items() if each is not None}
    sides = tuple(sorted(seen.clipped))
    bits = np.zeros(batch.loss_mask.shape, np.uint8)
    for index, side in enumerate(sides):
        bits |= seen.clipped[side].cpu().numpy().astype(np.uint8) << index
    columns[CLIPPED] = bits
    mask = batch.loss_mask.numpy()
    for row, uid in enumerate(batch.sequence_uids):
        own = {name: each[row][mask[row]] for name, each in columns.items()}
        if mask[row].any():
            yield TokenValues(uid, 0, own, sides)
