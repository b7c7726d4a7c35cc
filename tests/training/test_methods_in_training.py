"""What a method reads besides a forward: versions of the weights, selections, baselines."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from tests.training.harness import (
    assert_close,
    assert_same,
    flat,
    gradients,
    make_groups,
    model,
    on_policy,
    saved,
    trainer,
    weights_of,
)
from tir_alp.algorithm.presets import ALGORITHMS, AlgorithmConfig
from tir_alp.training import checkpoint
from tir_alp.training.batch import collate
from tir_alp.training.trainer import Trainer
from tir_alp.types import Sample, Trajectory, VersionSpan

SAME_VERSION = ALGORITHMS["tis_same_version"]
GRPO = ALGORITHMS["grpo"]


def with_versions(groups, first: int, second: int | None = None):
    """Give the turns of each trajectory the versions that sampled them; the second turn two."""

    def changed(sample: Sample) -> Sample:
        one, two = sample.trajectory.turns
        last = first if second is None else second
        spans = (VersionSpan(first, 0, 1), VersionSpan(last, 1, len(two.completion)))
        turns = (
            replace(one, policy_version=first),
            replace(two, policy_version=first, version_spans=spans if first != last else ()),
        )
        return replace(sample, trajectory=replace(sample.trajectory, turns=turns))

    return [[changed(sample) for sample in group] for group in groups]


def proximal_of(of: Trainer, groups, step: int) -> dict[int, torch.Tensor]:
    """The proximal logprobs that a trainer prepares for a step, by sequence."""
    batches = of._micro_batches(groups, step, update=0)
    return {
        uid: batch.proximal_logprobs[row, : batch.lengths[row]]
        for batch in batches
        for row, uid in enumerate(batch.sequence_uids)
        if batch.proximal_logprobs is not None
    }


def assert_logprobs_of_versions(found, groups, policies) -> None:
    """Every loss token has the logprob of a forward with the weights of its own version."""
    checked = 0
    for sample in flat(groups):
        each: Trajectory = sample.trajectory
        batch = collate([sample], with_versions=True)
        assert batch.versions is not None
        own = {version: on_policy(of, each.token_ids) for version, of in policies.items()}
        for place, version in enumerate(batch.versions[0].tolist()):
            if each.loss_mask[place]:
                expected = own[version][place - 1].item()
                assert found[each.sequence_uid][place].item() == pytest.approx(expected, abs=1e-6)
                checked += 1
    assert checked > 20


def test_proximal_logprobs_are_those_of_the_version_that_sampled_each_token(tmp_path):
    groups, of = make_groups(), model()
    one = trainer(SAME_VERSION, of, lr=1e-2, num_kept_versions=2)
    policies = {}
    for step in range(3):
        policies[step] = copy.deepcopy(model())
        policies[step].load_state_dict(weights_of(one))
        one.step(with_versions(groups, max(0, step - 1)), step)
    policies[3] = copy.deepcopy(model())
    policies[3].load_state_dict(weights_of(one))
    mixed = [*with_versions(groups[:2], 1, 3), *with_versions(groups[2:], 2)]
    before = weights_of(one)
    found = proximal_of(one, mixed, step=3)
    assert_logprobs_of_versions(found, mixed, policies)
    assert_same(before, weights_of(one))
    difference = on_policy(policies[1], mixed[0][0].trajectory.token_ids) - on_policy(
        policies[3], mixed[0][0].trajectory.token_ids
    )
    assert difference.abs().max() > 1e-3  # or the versions could not be told apart

    path = saved(one, tmp_path)  # and after a resume
    other = trainer(SAME_VERSION, model(), lr=1e-2, num_kept_versions=2)
    checkpoint.load(path, other)
    assert_logprobs_of_versions(proximal_of(other, mixed, step=3), mixed, policies)
    with pytest.raises(ValueError, match="the weights of version 0 are not kept"):
        proximal_of(other, with_versions(groups, 0), step=3)


def test_mismatch_and_staleness_are_told_apart():
    """The engine is off by 0.02; the weights have moved since."""
    groups = make_groups(jitter=0.02)
    one, two = (
        trainer(each, lr=1e-2, num_kept_versions=1)
        for each in (SAME_VERSION, ALGORITHMS["tis_token"])
    )
    for each in (one, two):
        each.step(with_versions(groups, 0), 0)
    own, mixed = (each.step(with_versions(groups, 0), 1).metrics for each in (one, two))
    assert own["mismatch/k3"] == pytest.approx(0.02**2 / 2, rel=0.5)
    assert mixed["mismatch/k3"] > 5 * own["mismatch/k3"]
    assert own["lag/k3"] > 5 * own["mismatch/k3"]


def test_without_staleness_the_versions_make_no_difference():
    groups = with_versions(make_groups(), 0)
    one, two = (trainer(each, lr=1e-3) for each in (SAME_VERSION, ALGORITHMS["tis_token"]))
    for each in (one, two):
        each.step(groups, 0)
    assert_same(weights_of(one), weights_of(two))


def test_interpolated_logprobs_lie_between_rollout_and_current_policy():
    groups = with_versions(make_groups(jitter=0.3), 1)
    one = trainer(ALGORITHMS["a3po"])
    (batch,) = one._micro_batches(groups, 4, update=0)
    assert batch.proximal_logprobs is None and batch.interpolation is not None
    share = batch.interpolation[batch.loss_mask]
    torch.testing.assert_close(share, torch.full_like(share, 3 / 4))
    fresh = trainer(ALGORITHMS["a3po"]).step(with_versions(groups, 0), 0).metrics
    assert "mismatch/kl" not in fresh and math.isfinite(fresh["loss/value"])


def loss_parts(algorithm: AlgorithmConfig, groups, **settings):
    one = trainer(algorithm, **settings)
    metrics = one.step(groups, 0).metrics
    return metrics, gradients(one)


@pytest.mark.parametrize(
    "name",
    ["top_entropy", "m2po", "clip_cov", "kl_cov", "otb", "tir_otb", "gigpo", "vcpo_step", "vcpo"],
)
def test_micro_batches_do_not_matter(name: str):
    groups = make_groups(jitter=0.3)
    if name == "gigpo":
        groups = [[replace(s, turn_advantages=(0.5, -1.0)) for s in group] for group in groups]
    whole, grads = loss_parts(ALGORITHMS[name], groups)
    parts, other = loss_parts(ALGORITHMS[name], groups, micro_batch_tokens=50)
    for key in ("loss/value", "loss/selected_fraction", "train/step_scale"):
        assert parts.get(key, 0) == pytest.approx(whole.get(key, 0), rel=1e-4, abs=1e-7), key
    assert_close(grads, other)


def test_the_tokens_with_the_largest_entropy_are_kept():
    metrics, _ = loss_parts(ALGORITHMS["top_entropy"], make_groups())
    assert metrics["loss/selected_fraction"] == pytest.approx(0.2, abs=0.03)


def test_a_baseline_of_tokens_lies_between_the_returns():
    """With equal returns nothing is left; a token that only one trajectory has keeps its return."""
    groups = make_groups()
    equal = [[replace(sample, advantage=0.0) for sample in group] for group in groups]
    _, grads = loss_parts(ALGORITHMS["tir_otb"], equal)
    assert all((each == 0).all() for each in grads.values())
    (batch,) = trainer(ALGORITHMS["tir_otb"])._micro_batches(groups, 0, update=0)
    assert batch.token_advantages is not None and batch.prompts is not None
    for group in set(batch.prompts.uids):
        rows = [row for row, uid in enumerate(batch.prompts.uids) if uid == group]
        own = [batch.token_advantages[row][batch.loss_mask[row]] for row in rows]
        shorter = min(map(len, own))
        values = [batch.advantages[row].item() for row in rows]
        for each, value in zip(own, values, strict=True):
            torch.testing.assert_close(each[shorter:], torch.full_like(each[shorter:], value))
        # two trajectories: the difference of their advantages is that of their returns
        gap = own[0][:shorter] - own[1][:shorter]
        torch.testing.assert_close(gap, torch.full_like(gap, values[0] - values[1]))
        for each, value in zip(own, values, strict=True):  # the baseline lies between the returns
            assert (each[:shorter] * math.copysign(1, value) > 0).all()


def test_the_advantages_of_turns_reach_their_tokens():
    groups = make_groups()
    by_turn = [[replace(s, turn_advantages=(0.25, -0.5)) for s in group] for group in groups]
    batch = collate(flat(by_turn))
    assert batch.token_advantages is not None
    for row, sample in enumerate(flat(by_turn)):
        turns, mask = batch.turn_ids[row], batch.loss_mask[row]
        for turn, added in enumerate((0.25, -0.5)):
            values = batch.token_advantages[row][mask & (turns == turn)]
            torch.testing.assert_close(values, torch.full_like(values, sample.advantage + added))


def test_a_small_effective_sample_size_makes_a_small_step():
    near, far = (
        loss_parts(ALGORITHMS["vcpo_step"], make_groups(jitter=jitter))[0] for jitter in (0.0, 1.0)
    )
    assert near["train/step_scale"] == pytest.approx(1.0, abs=1e-3)
    assert far["train/step_scale"] == pytest.approx(far["ratio/sequence_ess"] ** 0.5)
    assert far["train/step_scale"] < 0.8


def test_an_entropy_bonus_raises_the_entropy():
    groups = [[replace(s, advantage=0.0) for s in group] for group in make_groups()]
    strong = GRPO.model_copy(update={"entropy_bonus": 1.0})
    one = trainer(strong, lr=1e-3)
    entropies = [one.step(groups, step).metrics["entropy/mean"] for step in range(4)]
    assert entropies == sorted(entropies) and entropies[-1] > entropies[0] + 1e-3
