"""Metrics of a training step, over all ranks. Nothing here changes a weight."""

from __future__ import annotations

import functools
import operator
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tir_alp.algorithm.perturbation import Effect, LayerwisePerturbation
from tir_alp.algorithm.ratio_metrics import clean_metrics, lag_metrics, ratio_metrics
from tir_alp.algorithm.ratio_summary import RatioSummary
from tir_alp.training.batch import sequences_of
from tir_alp.training.ranks import Ranks
from tir_alp.training.shared_prompts import num_computed
from tir_alp.training.token_values import TokenValues
from tir_alp.types import Batch

_NUM_PROBED = 128  # approximate number of tokens of a step whose clean logprobs are computed too


@dataclass(frozen=True, slots=True)
class MadeUpdate:
    """What is reported of an update that was made."""

    metrics: dict[str, float]
    """Over all ranks."""
    ratios: RatioSummary
    """Of this rank."""
    clean: RatioSummary | None
    """Those of the policy without noise, of this rank; None: not measured in this step."""
    clean_s: float
    """Seconds that this measurement took on this rank."""
    lag: RatioSummary | None
    """Of the policy over its version that sampled, of this rank; None: not known."""
    values: tuple[TokenValues, ...] = ()
    """What the loss saw of the tokens of this rank, as far as it is reported."""


def metrics_of_updates(ranks: Ranks, made: Sequence[MadeUpdate]) -> dict[str, float]:
    """Describe the updates of a step that were made; empty if there were none."""
    if not made:
        return {}
    metrics = means_of([update.metrics for update in made])
    metrics |= ratio_metrics(over_ranks(ranks, [each.ratios for each in made]))
    if clean := [each.clean for each in made if each.clean is not None]:
        metrics |= clean_metrics(over_ranks(ranks, clean))
        metrics["time/clean"] = max(ranks.gather(sum(each.clean_s for each in made)))
    if made[0].lag is not None:  # before the step itself has changed the policy
        metrics |= lag_metrics(over_ranks(ranks, [made[0].lag]))
    return metrics


def sums_over_ranks(ranks: Ranks, values: Mapping[str, Tensor | float]) -> dict[str, float]:
    """Sum each value over ranks, which must all have the same names."""
    own = torch.tensor([float(value) for value in values.values()], dtype=torch.float64)
    return dict(zip(values, ranks.sum(own).tolist(), strict=True))


def over_ranks(ranks: Ranks, summaries: Sequence[RatioSummary]) -> RatioSummary:
    """Add up the summaries of this rank, and those of all ranks."""
    own = functools.reduce(operator.add, summaries)
    return functools.reduce(operator.add, ranks.gather(own))


def means_of(reports: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each metric over the reports that have it."""
    values: defaultdict[str, list[float]] = defaultdict(list)
    for report in reports:
        for name, value in report.items():
            values[name].append(value)
    return {name: sum(each) / len(each) for name, each in values.items()}


def sigma_metrics(perturbation: LayerwisePerturbation) -> dict[str, float]:
    """Describe the scale of the noise, as a mean and by layer."""
    sigma = perturbation.sigma
    each_sigma = zip(perturbation.names, sigma.tolist(), strict=True)
    return {
        "alp/sigma_mean": sigma.mean().item(),
        **{f"alp/sigma_{name}": each for name, each in each_sigma},
    }


def share_of_shared_tokens(ranks: Ranks, batches: Sequence[Batch]) -> float:
    """Share of the tokens that no forward computes, because another sequence has them too."""
    own = torch.zeros(2, dtype=torch.float64)
    for batch in batches:
        num_tokens = len(batch.token_ids)
        own += torch.tensor([num_tokens - num_computed(batch), num_tokens])
    num_shared, num_tokens = ranks.sum(own).tolist()
    return num_shared / num_tokens if num_tokens else 0.0


def probe_metrics(
    ranks: Ranks,
    batch: Batch,
    step: int,
    logprobs: Tensor,
    effect: Effect,
    clean_logprobs: Callable[[Batch], Tensor],
) -> dict[str, float]:
    """Measure what engine and noise each do to a few evenly spaced sequences.

    With d = trainer's logprob without noise - rollout logprob, `mismatch/probe_kl` is the mean of
    -d over loss tokens, `mismatch/probe_mean` and `mismatch/probe_max` are the mean and the maximum
    of |d|, and `alp/logprob_shift` is the mean |change of logprob| by the noise.

    Args:
        ranks: The processes that train together.
        batch: A micro-batch, before the weights change.
        step: Number of the step; each step begins with another sequence.
        logprobs: [B, T] logprobs of the forward that is trained on, without gradient.
        effect: What the noise did in that forward; empty if there was no noise.
        clean_logprobs: Computes logprobs [B, T] with the current weights, without noise.
    """
    own = sums_over_ranks(ranks, effect.metrics())
    metrics = {name: total / ranks.size for name, total in own.items()}
    has_noise = bool(metrics)
    every = -(-sum(batch.lengths) // _NUM_PROBED)
    rows = range(step % min(every, len(batch.lengths)), len(batch.lengths), every)
    few = sequences_of(batch, rows)
    clean = few.proximal_logprobs
    if clean is None:
        clean = clean_logprobs(few)
    difference = (clean - few.rollout_logprobs)[few.loss_mask].cpu()
    sums = {
        "mismatch/probe_kl": -difference.sum(),
        "mismatch/probe_mean": difference.abs().sum(),
        "tokens": difference.numel(),
    }
    if has_noise:
        shift = (logprobs[list(rows)] - clean)[few.loss_mask]
        sums["alp/logprob_shift"] = shift.abs().sum()
    totals = sums_over_ranks(ranks, sums)
    num_tokens = totals.pop("tokens")
    largest = max(ranks.gather(max(difference.abs().tolist(), default=0.0)))
    if num_tokens == 0:
        return metrics
    metrics |= {name: total / num_tokens for name, total in totals.items()}
    return metrics | {"mismatch/probe_max": largest}
