"""Training in float16: a scaled loss, updates that overflow, and a scale that is resumed."""

import math

import pytest
import torch

from tests.training.harness import (
    assert_same,
    gradients,
    make_groups,
    noisy,
    saved,
    trainer,
    weights_of,
    with_advantage,
)
from tir_alp.training import checkpoint
from tir_alp.training.trainer import Trainer


def in_float16(scale: float | None = None, num_updates: int = 0, **settings) -> Trainer:
    """A trainer in float16, whose loss scale was reached some updates ago."""
    one = trainer(noisy(init_std=0.01), dtype="float16", **settings)
    if scale is not None:
        state = {"loss_scale": torch.tensor([scale, num_updates], dtype=torch.float64)}
        one._optimizer.finish_loading(state)
    return one


def test_a_scaled_gradient_is_that_of_float32_up_to_rounding():
    """With a scale far too small, small numbers vanish, as they would for a larger model at 1."""
    exact = trainer(noisy(init_std=0.01))
    exact.step(make_groups(), 0)
    expected = gradients(exact)

    def worst(scale: float) -> float:
        one = in_float16(scale)
        assert one.step(make_groups(), 0).metrics["train/loss_scale"] == scale
        found = gradients(one)
        return max(
            float((found[name] - each).norm() / each.norm()) for name, each in expected.items()
        )

    assert worst(2.0**16) < 0.02 < 0.2 < worst(2.0**-14)


def test_an_update_that_overflows_is_skipped_counted_and_halves_the_scale():
    one = in_float16(2.0**30)  # a bad update would fail the test
    before = weights_of(one)
    metrics = one.step(make_groups(), 0).metrics
    assert (metrics["train/skipped_updates"], metrics["train/loss_scale"]) == (1, 2.0**29)
    assert_same(weights_of(one), before)
    later = [one.step(make_groups(), step).metrics for step in range(1, 20)]
    num_skipped = sum(each["train/skipped_updates"] for each in later)
    assert 0 < num_skipped < 19 and later[-1]["train/loss_scale"] == 2.0 ** (29 - num_skipped)
    assert any(not torch.equal(after, before[name]) for name, after in weights_of(one).items())


def test_a_scale_without_an_overflow_grows():
    one = in_float16(1024.0, num_updates=98)
    scales = [one.step(make_groups(), step).metrics["train/loss_scale"] for step in range(3)]
    assert scales == [1024.0, 2048.0, 2048.0]


@pytest.mark.parametrize(("scale", "advantage"), [(2.0**16, math.nan), (1.0, 1e38)])
def test_what_no_scale_explains_is_a_bad_update(scale, advantage):
    """The loss is not a number, or the gradient overflows although it is not scaled."""
    told = []
    one = in_float16(scale, bad=lambda update, _: told.append(update))
    one.step(with_advantage(make_groups(), advantage), 0)
    assert told == [0]


def test_a_resumed_trainer_goes_on_bit_for_bit_with_the_scale(tmp_path):
    whole = in_float16(2.0**12, num_updates=98)
    whole.step(make_groups(), 0)
    path = saved(whole, tmp_path)
    resumed = in_float16()
    checkpoint.load(path, resumed)
    for step in (1, 2):
        expected, found = (each.step(make_groups(), step).metrics for each in (whole, resumed))
        assert found == expected
    assert found["train/loss_scale"] == 2.0**13
    assert_same(weights_of(resumed), weights_of(whole))
