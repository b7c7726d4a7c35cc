"""The learning rate over a run: its values, where it acts, and that resuming changes nothing."""

import math

import pytest
import torch

from tests.training.harness import assert_same, make_groups, noisy, saved, trainer, weights_of
from tir_alp.algorithm.presets import ALGORITHMS
from tir_alp.config import TrainerConfig
from tir_alp.training import checkpoint
from tir_alp.training.schedule import lr_factor

COSINE = {"schedule": "cosine", "warmup_steps": 2, "min_lr_ratio": 0.1}


def factors(num_steps: int | None, **settings) -> list[float]:
    config = TrainerConfig.model_validate(settings)
    return [lr_factor(config, num_steps, step) for step in range(num_steps or 6)]


def test_the_rate_by_step():
    assert factors(None) == [1.0] * 6
    assert factors(None, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert factors(4, schedule="linear") == [1.0, 0.75, 0.5, 0.25]
    linear = factors(6, schedule="linear", warmup_steps=2, min_lr_ratio=0.2)
    assert linear == pytest.approx([0.5, 1.0, 1.0, 0.8, 0.6, 0.4])
    cosine = factors(6, **COSINE)
    assert cosine == pytest.approx([0.5, 1, 1, 0.55 + 0.45 * math.sqrt(0.5), 0.55, 0.2318019], 1e-6)


def test_a_warm_up_longer_than_the_run_only_rises():
    assert factors(2, schedule="cosine", warmup_steps=4) == [0.25, 0.5]


def test_a_rate_is_logged_and_is_that_of_the_update():
    """Adam's first update moves a weight by the rate, up to its gradient's size and the decay."""
    groups = make_groups()
    moved = {}
    for warmup in (0, 8):
        one = trainer(ALGORITHMS["bypass_token"], warmup_steps=warmup, weight_decay=0.0, lr=1e-3)
        before = weights_of(one)
        rate = one.step(groups, 0).metrics["train/lr"]
        largest = max((after - before[name]).abs().max() for name, after in one.weights())
        moved[warmup] = (rate, largest.item())
    assert moved[0] == pytest.approx((1e-3, 1e-3), rel=1e-2)
    assert moved[8] == pytest.approx((1.25e-4, 1.25e-4), rel=1e-2)


def test_log_sigma_keeps_its_own_rate():
    groups = make_groups()
    sigmas = []
    for warmup in (0, 8):
        one = trainer(noisy(), warmup_steps=warmup)
        one.step(groups, 0)
        assert one._perturbation is not None
        sigmas.append(one._perturbation.log_sigma.detach().clone())
    assert torch.equal(*sigmas)


def run_on(one, groups, steps) -> list[float]:
    return [one.step(groups, step).metrics["train/lr"] for step in steps]


def test_resuming_is_bit_for_bit_the_same(tmp_path):
    groups = make_groups()
    whole = trainer(noisy(), num_steps=6, **COSINE)
    rates = run_on(whole, groups, range(6))
    first = trainer(noisy(), num_steps=6, **COSINE)
    assert run_on(first, groups, range(3)) == rates[:3]
    second = trainer(noisy(), num_steps=6, **COSINE)
    checkpoint.load(saved(first, tmp_path), second)
    assert run_on(second, groups, range(3, 6)) == rates[3:]
    assert len(set(rates)) == 5
    assert_same(weights_of(second), weights_of(whole))


def test_with_another_number_of_steps_the_rate_is_that_of_such_a_run(tmp_path):
    groups = make_groups()
    first = trainer(noisy(), num_steps=6, **COSINE)
    run_on(first, groups, range(3))
    second = trainer(noisy(), num_steps=12, **COSINE)
    checkpoint.load(saved(first, tmp_path), second)
    config = TrainerConfig.model_validate(COSINE | {"lr": 1e-4})
    expected = [1e-4 * lr_factor(config, 12, step) for step in range(3, 6)]
    assert run_on(second, groups, range(3, 6)) == pytest.approx(expected, rel=1e-12)


def test_a_run_that_is_rolled_back_has_the_rates_of_its_steps_again():
    groups = make_groups()
    one = trainer(ALGORITHMS["bypass_token"], num_steps=6, **COSINE)
    rates = run_on(one, groups, range(4))
    assert run_on(one, groups, range(4)) == rates
