"""The policy without noise is measured on a step's own tokens, with the weights of its updates."""

from typing import Any

import pytest
import torch

from tests.training.harness import (
    assert_same,
    flat,
    make_groups,
    model,
    noisy,
    on_policy,
    trainer,
    weights_of,
)
from tir_alp.algorithm.presets import ALGORITHMS

CLEAN: dict[str, Any] = {"lr": 1e-3, "updates_per_step": 2, "clean_every": 2}


def clean_of(metrics: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in metrics.items() if "_clean/" in key}


def test_measures_equal_a_forward_of_each_sequence_alone():
    groups, of = make_groups(jitter=0.05), model()
    found = trainer(noisy(), clean_every=1).step(groups, 0).metrics
    ratios, kl = [], []
    for sample in flat(groups):
        each = sample.trajectory
        mask = torch.tensor(each.loss_mask[1:])
        own = on_policy(of, each.token_ids)[mask].double()
        difference = own - torch.tensor(each.rollout_logprobs[1:])[mask].double()
        ratios.append(difference.sum().exp())
        kl.append(-difference)
    expected = torch.quantile(torch.stack(ratios), torch.tensor([0.02, 0.5, 0.98]).double())
    for percent, value in zip((2, 50, 98), expected.tolist(), strict=True):
        assert found[f"ratio_clean/p{percent}"] == pytest.approx(value, rel=1e-4)
    assert found["kl_clean/rollout"] == pytest.approx(torch.cat(kl).mean().item(), rel=1e-3)
    assert found["ratio/p98"] != pytest.approx(found["ratio_clean/p98"], rel=1e-2)


def test_a_method_without_noise_reports_its_own_numbers_in_the_same_steps():
    groups = make_groups()
    bypass, alp = (trainer(each, **CLEAN) for each in (ALGORITHMS["bypass_sequence"], noisy()))
    for step in range(3):
        own, other = bypass.step(groups, step).metrics, alp.step(groups, step).metrics
        assert clean_of(own).keys() == clean_of(other).keys()
        assert bool(clean_of(own)) == ("time/clean" in own) == (step % 2 == 0)
        for name, value in clean_of(own).items():
            area, _, key = name.partition("/")
            if area != "loss_clean":  # over all tokens, where the other is a mean over updates
                assert own[f"{area.removesuffix('_clean')}/{key}"] == value, name


def test_noise_that_is_off_is_measured_as_the_method_without_noise():
    """Both updates of the step: each is measured with the weights that it had."""
    groups = make_groups()
    bypass, alp = (
        trainer(each, **CLEAN) for each in (ALGORITHMS["bypass_sequence"], noisy(init_std=0.0))
    )
    assert clean_of(bypass.step(groups, 0).metrics) == clean_of(alp.step(groups, 0).metrics)


def test_measuring_changes_no_bit_of_training():
    groups = make_groups()
    never: dict[str, Any] = CLEAN | {"clean_every": 0}
    measured, plain = trainer(noisy(), **CLEAN), trainer(noisy(), **never)
    for step in range(2):
        one, other = measured.step(groups, step).metrics, plain.step(groups, step).metrics
        assert not clean_of(other)
        assert other == {key: value for key, value in one.items() if key in other}
    assert_same(weights_of(measured), weights_of(plain))


def test_the_size_of_micro_batches_does_not_matter():
    groups = make_groups()
    one, other = (
        clean_of(trainer(noisy(), clean_every=1, micro_batch_tokens=size).step(groups, 0).metrics)
        for size in (10_000, 50)
    )
    assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
