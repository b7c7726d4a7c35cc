"""Updates that the engine has not gained from are undone: exactly, and the run goes on."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.training.harness import (
    Groups,
    assert_same,
    flat,
    make_groups,
    model,
    on_policy,
    saved,
    trainer,
    weights_of,
)
from tir_alp.algorithm.acceptance import inference_gap, tolerance_at
from tir_alp.algorithm.presets import (
    ALGORITHMS,
    AcceptanceConfig,
    AlgorithmConfig,
    PerturbationConfig,
)
from tir_alp.config import Config
from tir_alp.training import checkpoint
from tir_alp.training.trainer import Trainer
from tir_alp.training.weight_versions import own_share


def mipu(tolerance: float, **changes: Any) -> AlgorithmConfig:
    how = AcceptanceConfig(tolerance=tolerance, last_tolerance=tolerance)
    return ALGORITHMS["mipu"].model_copy(update={"acceptance": how, **changes})


def state_of(one: Trainer) -> dict[str, torch.Tensor]:
    """Copies of everything that updates change; norms that there are not yet are -1."""
    state = one._own_state().items()
    return {name: own_share(each).clone().nan_to_num(-1.0) for name, each in state}


def gap_of(groups: Groups, of: Any) -> float:
    """T by the formula, for the weights of a model, in float64."""
    values = []
    for sample in flat(groups):
        each = sample.trajectory
        mask = np.array(each.loss_mask)
        own = np.array([0.0, *on_policy(of, each.token_ids).tolist()])
        changes = (own - np.array(each.rollout_logprobs))[mask]
        values.append(math.exp(changes.mean()) * sample.advantage)
    return -math.fsum(values) / len(values)


def test_the_gap_is_that_of_the_formula_on_the_samples_of_the_next_step():
    groups, of = make_groups(jitter=0.1), model()
    one = trainer(mipu(10.0), of, lr=1e-3)
    first = one.step(groups, 0).metrics
    assert "acceptance/gap" not in first  # nothing was updated before
    after = model()
    after.load_state_dict(weights_of(one))
    second = one.step(groups, 1).metrics
    assert second["acceptance/gap"] == pytest.approx(gap_of(groups, after), rel=1e-4)
    assert second["acceptance/gap"] != pytest.approx(gap_of(groups, model()), rel=1e-4)
    assert second["acceptance/rejected"] == 0.0


def test_accepted_updates_are_those_of_the_method_without_acceptance():
    groups = make_groups(jitter=0.1)
    one, other = (trainer(each, lr=1e-3) for each in (mipu(10.0), mipu(10.0, acceptance=None)))
    for step in range(3):
        one.step(groups, step)
        other.step(groups, step)
    assert_same(weights_of(one), weights_of(other))


@pytest.mark.parametrize("updates_per_step", [1, 2])
@pytest.mark.parametrize("noise", [None, PerturbationConfig(init_std=0.1)])
def test_a_rejected_step_goes_back_to_the_last_accepted_state(updates_per_step, noise):
    """The groups reward what the update has made likelier, so the trainer's policy is better."""
    groups = make_groups(jitter=0.1)
    algorithm = mipu(0.0, perturbation=noise)
    one = trainer(algorithm, lr=1e-3, updates_per_step=updates_per_step)
    before = state_of(one)
    one.step(groups, 0)
    assert not torch.equal(
        before["weights.model.embed_tokens.weight"],
        state_of(one)["weights.model.embed_tokens.weight"],
    )
    report = one.step(groups, 1)
    assert report.metrics["acceptance/gap"] < 0 and report.metrics["acceptance/rejected"] == 1.0
    assert report.metrics["train/skipped_updates"] == updates_per_step
    assert [each.made for each in report.updates] == [False] * updates_per_step
    assert len(report.updates[0].sequences) == 8 // updates_per_step
    assert_same(state_of(one), before)

    third = one.step(groups, 2).metrics  # what was accepted is not judged again
    assert "acceptance/gap" not in third and third["train/skipped_updates"] == 0
    other = trainer(algorithm, lr=1e-3, updates_per_step=updates_per_step)
    other.step(groups, 2)
    assert_same(weights_of(one), weights_of(other))  # as if the first two steps had not been


def test_a_resumed_run_judges_and_undoes_as_the_run_would_have(tmp_path):
    groups = make_groups(jitter=0.1)
    one = trainer(mipu(0.0), lr=1e-3)
    before = state_of(one)
    one.step(groups, 0)
    path = saved(one, tmp_path)
    other = trainer(mipu(0.0), lr=1e-3)
    checkpoint.load(path, other)
    assert_same(state_of(other), state_of(one))
    for each in (one, other):
        assert each.step(groups, 1).metrics["acceptance/rejected"] == 1.0
        assert_same(state_of(each), before)
        each.step(groups, 2)
    assert_same(weights_of(one), weights_of(other))


def test_in_float16_the_loss_scale_goes_back_too():
    groups = make_groups(jitter=0.1)
    one = trainer(mipu(0.0), lr=1e-3, dtype="float16")
    before = state_of(one)
    one.step(groups, 0)
    one._optimizer._scaler.update(new_scale=8.0)
    assert one.step(groups, 1).metrics["acceptance/rejected"] == 1.0
    assert_same(state_of(one), before)


def test_a_gap_that_is_not_a_number_is_rejected():
    one = trainer(mipu(10.0), lr=1e-3)
    before = state_of(one)
    one.step(make_groups(), 0)
    own_share(one._trained()["model.embed_tokens.weight"])[0, 0] = math.nan
    assert one.step(make_groups(), 1).metrics["acceptance/rejected"] == 1.0
    assert_same(state_of(one), before)


def test_a_step_without_tokens_decides_nothing():
    one = trainer(mipu(0.0), lr=1e-3)
    before = state_of(one)
    one.step(make_groups(), 0)
    void = [
        [replace(each, trajectory=replace(each.trajectory, turns=())) for each in group]
        for group in make_groups(1)
    ]
    assert "acceptance/gap" not in one.step(void, 1).metrics
    assert one.step(make_groups(), 2).metrics["acceptance/rejected"] == 1.0
    assert_same(state_of(one), before)


def test_the_estimate_is_the_difference_of_the_expected_rewards():
    """For two policies over three answers, whose rewards and probabilities are known."""
    rng = np.random.default_rng(0)
    rewards = np.array([1.0, 0.0, 0.3])
    engine = np.array([0.2, 0.5, 0.3])
    for better in (0.05, -0.05):
        own = engine + np.array([better, -better, 0.0])
        drawn = rng.choice(3, size=200_000, p=engine)
        advantages = rewards[drawn] - engine @ rewards
        found = inference_gap(np.log(own / engine)[drawn].tolist(), advantages.tolist())
        assert found == pytest.approx((engine - own) @ rewards, abs=2e-3)


def test_the_tolerance_changes_linearly():
    how = AcceptanceConfig(tolerance=1e-3, last_tolerance=2e-4, tolerance_steps=100)
    found = [tolerance_at(step, how) for step in (0, 50, 100, 1000)]
    assert found == pytest.approx([1e-3, 6e-4, 2e-4, 2e-4])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rollout": {"max_staleness": 1}},
            "acceptance needs rollout.max_staleness = 0, and it is 1",
        ),
        ({"algorithm": {"proximal": "rollout_version"}}, 'and proximal = "current"'),
        (
            {"algorithm": {"denominator": "rollout", "correction": None}},
            "it needs a method that reads proximal logprobs",
        ),
    ],
)
def test_what_acceptance_needs_is_said(changes, message):
    algorithm = {"name": "mipu", **changes.pop("algorithm", {})}
    with pytest.raises(ValueError, match=message):
        Config.model_validate({"algorithm": algorithm, **changes})
