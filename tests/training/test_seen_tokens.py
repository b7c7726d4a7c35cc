"""What is recorded of single tokens is what the loss was computed from."""

import numpy as np
import pytest
import torch

from tests.training.harness import flat, make_groups, noisy, trainer
from tir_alp.algorithm.inputs import LossInputs
from tir_alp.algorithm.loss import log_ratios, policy_loss
from tir_alp.algorithm.presets import ALGORITHMS
from tir_alp.records.token_values import read_values, write_values

METHODS = {"grpo": ALGORITHMS["grpo"], "bypass_sequence": ALGORITHMS["bypass_sequence"]}
METHODS |= {"alp_token": noisy("alp_token"), "alp_sequence": noisy("alp_sequence")}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("updates", [1, 2])
def test_the_loss_is_that_of_the_recorded_values(name, updates):
    groups, method = make_groups(), METHODS[name]
    one = trainer(method, micro_batch_tokens=60, updates_per_step=updates, max_token_values=10_000)
    report = one.step(groups, 3)
    found = {each.uid: each for each in report.values}
    samples = {sample.trajectory.sequence_uid: sample for sample in flat(groups)}
    assert found.keys() == samples.keys()
    losses, clipped, num_tokens = [], 0, 0
    for update in sorted({each.update for each in report.values}):
        of_update = [each for each in report.values if each.update == update]
        longest = max(map(len, of_update))

        def wide(rows, size=longest):
            padded = [np.pad(row.astype(np.float32), (0, size - len(row))) for row in rows]
            return torch.tensor(np.stack(padded))

        trajectories = [samples[each.uid].trajectory for each in of_update]
        rollout = [
            np.array(each.rollout_logprobs)[np.array(each.loss_mask)] for each in trajectories
        ]
        inputs = LossInputs(
            logprobs=wide([each.columns["logprob"] for each in of_update]),
            rollout_logprobs=wide(rollout),
            advantages=torch.tensor([samples[each.uid].advantage for each in of_update]),
            loss_mask=wide([np.ones(len(each)) for each in of_update]).bool(),
            proximal_logprobs=(
                wide([each.columns["proximal"] for each in of_update])
                if method.needs_proximal
                else None
            ),
        )
        loss, _ = policy_loss(inputs, method)
        losses.append(float(loss))
        ratios = log_ratios(inputs, method)
        for row, each in enumerate(of_update):
            np.testing.assert_array_equal(each.columns["log_ratio"], ratios[row][: len(each)])
            clipped += int((each.columns["clipped"] > 0).sum())
            num_tokens += len(each)
    assert report.metrics["loss/value"] == pytest.approx(np.mean(losses), rel=1e-5)
    if updates == 1:
        assert report.metrics["loss/clip_fraction"] == pytest.approx(clipped / num_tokens)


def test_the_mean_entropy_and_the_clean_logprobs_are_those_of_the_metrics():
    one = trainer(noisy("alp_token"), clean_every=1, max_token_values=10_000)
    report = one.step(make_groups(), 0)
    entropy = np.concatenate([each.columns["entropy"] for each in report.values])
    assert report.metrics["entropy/mean"] == pytest.approx(entropy.mean(), rel=1e-5)
    for each in report.values:
        assert not np.array_equal(each.columns["clean"], each.columns["logprob"])


def test_no_more_tokens_are_recorded_than_asked_for_and_none_by_default():
    assert trainer(METHODS["grpo"]).step(make_groups(), 0).values == ()
    few = trainer(METHODS["grpo"], max_token_values=40).step(make_groups(), 0).values
    assert 0 < sum(map(len, few)) <= 40


def test_values_are_read_back_one_sequence_at_a_time(tmp_path):
    values = trainer(noisy("alp_token"), max_token_values=10_000).step(make_groups(), 0).values
    write_values(tmp_path, 1, values)
    for each in values:
        found = read_values(tmp_path, 1, each.uid)
        assert found is not None and found.clip_sides == each.clip_sides
        assert found.columns.keys() == each.columns.keys()
        for name, column in each.columns.items():
            np.testing.assert_array_equal(found.columns[name], column)
    assert read_values(tmp_path, 1, 999) is None
    assert read_values(tmp_path, 2, values[0].uid) is None
