"""The baseline of VCPO: gradient norms of single trajectories, and what follows from them."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.training.harness import (
    assert_close,
    assert_same,
    flat,
    gradients,
    make_groups,
    model,
    noisy,
    trainer,
    weights_of,
)
from tir_alp.algorithm.presets import ALGORITHMS
from tir_alp.algorithm.token_baselines import off_policy_baseline
from tir_alp.training.attention import PackedSequences
from tir_alp.training.gradient_baseline import with_gradient_baseline
from tir_alp.training.policy import hidden_states, token_logprobs
from tir_alp.types import Batch, Sample

VCPO = ALGORITHMS["vcpo"]


def log_ratio_and_norm(sample: Sample) -> tuple[float, float]:
    """Of one trajectory, by a forward and a backward pass of the plain model, in float64."""
    of, each = model().double(), sample.trajectory
    ids = torch.tensor(each.token_ids)
    hidden = hidden_states(of, ids, torch.arange(len(ids)), PackedSequences((len(ids),)))
    logprobs = token_logprobs(of, hidden[:-1], ids[1:], temperature=1.0)[0]
    mask = torch.tensor(each.loss_mask[1:])
    total = logprobs[mask].sum()
    total.backward()
    squares = [float(p.grad.square().sum()) for p in of.parameters() if p.grad is not None]
    rollout = math.fsum(np.array(each.rollout_logprobs)[np.array(each.loss_mask)])
    return total.item() - rollout, math.sqrt(math.fsum(squares))


def baselines(groups) -> list[float]:
    """b of each group, by the formula."""
    found = []
    for group in groups:
        scores = [log_ratio_and_norm(sample) for sample in group]
        weights = [(math.exp(log_ratio) * norm) ** 2 for log_ratio, norm in scores]
        returns = [sample.advantage for sample in group]
        total = sum(w * r for w, r in zip(weights, returns, strict=True))
        found.append(total / sum(weights))
    return found


def seen_by(one, groups, update: int = 0) -> dict[int, Batch]:
    batches = one._micro_batches(groups, 0, update)
    found = with_gradient_baseline(batches, one.ranks, lambda batch: one._score(update, batch))
    return {uid: batch for batch in found for uid in batch.sequence_uids}


@pytest.mark.parametrize("size", [2, 4])
def test_the_baseline_is_that_of_the_formula(size: int):
    groups = make_groups(jitter=0.2)
    if size == 4:  # two groups become one
        groups = [[*groups[0], *groups[1]], [*groups[2], *groups[3]]]
        groups = [
            [replace(each, trajectory=replace(each.trajectory, group_id=number)) for each in group]
            for number, group in enumerate(groups)
        ]
    found = seen_by(trainer(VCPO), groups)
    expected = baselines(groups)
    assert len({round(each, 3) for each in expected}) == len(groups)
    for group, baseline in zip(groups, expected, strict=True):
        for sample in group:
            uid = sample.trajectory.sequence_uid
            batch = found[uid]
            assert batch.token_advantages is not None
            row = batch.sequence_uids.index(uid)
            own = batch.token_advantages[row][batch.loss_mask[row]]
            due = sample.advantage - baseline
            torch.testing.assert_close(own, torch.full_like(own, due), rtol=1e-4, atol=1e-5)


def test_the_update_is_that_of_the_advantages_minus_the_baseline():
    groups = make_groups(jitter=0.2)
    shifted = [
        [replace(sample, advantage=sample.advantage - baseline) for sample in group]
        for group, baseline in zip(groups, baselines(groups), strict=True)
    ]
    plain = VCPO.model_copy(update={"advantage": "grpo"})
    one, other = trainer(VCPO), trainer(plain)
    found, expected = one.step(groups, 0), other.step(shifted, 0)
    assert found.metrics["loss/value"] == pytest.approx(expected.metrics["loss/value"], rel=1e-4)
    assert_close(gradients(one), gradients(other))
    assert (
        found.updates != expected.updates
    )  # the record has the advantages that follow from rewards
    (update,) = found.updates
    assert {each.advantage for each in update.sequences} == {
        float(np.float32(sample.advantage)) for sample in flat(groups)
    }


def test_the_second_update_of_a_step_has_the_gradients_of_its_own_weights():
    groups = make_groups(jitter=0.2)
    both = trainer(VCPO, updates_per_step=2, lr=1e-2)
    both.step(groups, 0)
    one = trainer(VCPO, lr=1e-2)
    one.step(groups[:2], 0)
    one.step(groups[2:], 1)
    assert_same(weights_of(both), weights_of(one))


def test_the_passes_of_single_sequences_leave_nothing_behind():
    """With equal returns the baseline takes everything, and the weights stay."""
    groups = [[replace(sample, advantage=0.5) for sample in group] for group in make_groups()]
    one = trainer(VCPO)
    metrics = one.step(groups, 0).metrics
    assert metrics["grad_norm/policy"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["loss/value"] == pytest.approx(0.0, abs=1e-6)


def test_noise_of_the_policy_is_that_of_its_scores():
    perturbed = noisy("vcpo", init_std=0.3)
    groups = make_groups()
    clean, noise = (seen_by(trainer(each), groups) for each in (VCPO, perturbed))
    again, later = (seen_by(trainer(perturbed), groups, update) for update in (0, 1))

    def advantages(found: dict[int, Batch]) -> torch.Tensor:
        batch = found[0]
        assert batch.token_advantages is not None
        return batch.token_advantages[batch.sequence_uids.index(0)]

    assert torch.equal(advantages(noise), advantages(again))
    assert not torch.allclose(advantages(noise), advantages(clean), atol=1e-4)
    assert not torch.allclose(advantages(noise), advantages(later), atol=1e-4)


def test_the_baseline_of_a_group():
    assert off_policy_baseline([1.0, -1.0], [0.0, 0.0], [1.0, 1.0]) == 0.0
    assert off_policy_baseline([1.0, -1.0], [0.0, 0.0], [2.0, 1.0]) == pytest.approx(0.6)
    assert off_policy_baseline([1.0, -1.0], [math.log(2), 0.0], [1.0, 1.0]) == pytest.approx(0.6)
    assert off_policy_baseline([1.0, -1.0], [0.0, 0.0], [0.0, 0.0]) == 0.0
    assert off_policy_baseline([1.0, -1.0], [1e9, -1e9], [1.0, 1.0]) == pytest.approx(1.0)


def test_the_baseline_has_the_least_variance():
    """Among all baselines: of the estimate sum_i w_i g_i (R_i - b), for fixed w and g."""
    rng = np.random.default_rng(0)
    returns, log_ratios, norms = rng.normal(size=8), rng.normal(size=8), rng.uniform(0.1, 2.0, 8)
    best = off_policy_baseline(returns.tolist(), log_ratios.tolist(), norms.tolist())

    def spread(baseline: float) -> float:
        return float(np.square(np.exp(log_ratios) * norms * (returns - baseline)).sum())

    assert all(spread(best) < spread(best + shift) for shift in (-0.1, -1e-3, 1e-3, 0.1))
