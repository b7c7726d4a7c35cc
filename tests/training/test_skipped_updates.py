"""Updates that are skipped: not finite, gradient spikes, nothing to learn."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.training.harness import (
    assert_same,
    make_groups,
    noisy,
    saved,
    trainer,
    weights_of,
    with_advantage,
    with_logprob,
)
from tir_alp.training import checkpoint


@pytest.mark.parametrize(
    "bad",
    [
        with_advantage(make_groups(), math.nan),
        with_advantage(make_groups(), math.inf),
        with_logprob(make_groups(), math.nan),
        with_logprob(make_groups(), math.inf),
        with_logprob(make_groups(), -math.inf),
    ],
    ids=["advantage nan", "advantage inf", "logprob nan", "logprob inf", "logprob -inf"],
)
def test_an_update_that_is_not_finite_is_skipped_reported_and_changes_nothing(bad):
    told = []
    one = trainer(noisy(), bad=lambda update, batches: told.append((update, batches)))
    before = weights_of(one)
    metrics = one.step(bad, 5).metrics
    assert metrics["train/skipped_updates"] == 1
    ((update, batches),) = told
    assert update == 5
    assert {uid for batch in batches for uid in batch.sequence_uids} == set(range(8))
    assert_same(weights_of(one), before)
    assert metrics["alp/sigma_mean"] == pytest.approx(0.1)

    never_hurt, groups = trainer(noisy()), make_groups()
    assert one.step(groups, 6).metrics == never_hurt.step(groups, 6).metrics
    assert_same(weights_of(one), weights_of(never_hurt))


def test_a_gradient_of_sigma_that_is_not_finite_skips_the_update_too():
    told = []
    one = trainer(noisy(), bad=lambda update, _: told.append(update))
    assert one._perturbation is not None
    before = weights_of(one)
    spoil = one._perturbation.log_sigma.register_hook(lambda gradient: gradient * math.nan)
    one.step(make_groups(), 0)
    spoil.remove()
    assert told == [0]
    assert_same(weights_of(one), before)
    assert one._perturbation.sigma.tolist() == pytest.approx([0.1] * 3)


def test_the_other_updates_of_a_step_are_made():
    told = []
    one = trainer(noisy(), bad=lambda update, _: told.append(update), updates_per_step=2)
    metrics = one.step(with_advantage(make_groups(), math.nan), 3).metrics
    assert told == [6]
    assert metrics["train/skipped_updates"] == 1
    assert math.isfinite(metrics["loss/value"])


def test_a_step_with_nothing_to_learn_makes_no_update():
    groups = make_groups(2)
    void = [
        [
            replace(
                each,
                trajectory=replace(each.trajectory, turns=()),
            )
            for each in group
        ]
        for group in groups
    ]
    one = trainer(noisy())
    before = weights_of(one)
    assert one.step(void, 0).metrics["tokens/loss"] == 0
    assert_same(weights_of(one), before)


def test_a_gradient_spike_is_skipped_and_told(tmp_path):
    """The spike has no effect, and a loaded trainer has the previous norms."""
    told: list[int] = []
    settings: dict[str, Any] = {
        "skip_grad_spike": 20.0,
        "bad": lambda update, _: told.append(update),
    }
    one = trainer(noisy(init_std=0.01), **settings)
    groups = make_groups()
    for step in range(8):
        assert one.step(groups, step).metrics["train/skipped_updates"] == 0
    huge = [[replace(sample, advantage=1e4) for sample in group] for group in groups]
    other = trainer(noisy(init_std=0.01), **settings)
    checkpoint.load(saved(one, tmp_path), other)
    for each in (one, other):
        before = weights_of(each)
        assert each.step(huge, 8).metrics["train/skipped_updates"] == 1
        assert_same(weights_of(each), before)
        assert each.step(groups, 9).metrics["train/skipped_updates"] == 0
    assert told == [8, 8]


@pytest.mark.parametrize("name", ["grad_norm/policy", "grad_norm/log_sigma"])
def test_the_gradients_of_weights_and_sigma_are_each_compared_with_their_own(name):
    one = trainer(noisy(), bad=lambda *_: None, skip_grad_spike=20.0)
    usual = {each: torch.full((8,), 1e9) for each in ("grad_norm/policy", "grad_norm/log_sigma")}
    one.finish_loading(usual)
    assert one.step(make_groups(), 0).metrics["train/skipped_updates"] == 0
    one.finish_loading(usual | {name: torch.full((8,), 1e-12)})
    assert one.step(make_groups(), 1).metrics["train/skipped_updates"] == 1
