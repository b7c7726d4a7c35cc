"""Metrics by hand, and against numpy."""

import functools
import math
import operator
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch

from tir_alp.algorithm.inputs import LossInputs
from tir_alp.algorithm.metrics import (
    evaluation_metrics,
    is_correct,
    reward_part_metrics,
    rollout_metrics,
    staleness_metrics,
)
from tir_alp.algorithm.ratio_metrics import mismatch_metrics, ratio_quantiles
from tir_alp.algorithm.ratio_summary import summarise
from tir_alp.tools.outcome import Outcome
from tir_alp.types import StopReason, TokenSpan, Trajectory, TrajectoryGroup, Turn, VersionSpan


def turn(num_tokens: int = 1, **changes) -> Turn:
    fields = {
        "completion": TokenSpan((7,) * num_tokens, (-0.1,) * num_tokens),
        "observation": TokenSpan(()),
        "policy_version": 0,
        "stop_reason": StopReason.EOS,
        "outcome": Outcome.OK,
        "reward": 0.0,
        "timing": {"generate": 0.0, "tool": 0.0},
    }
    return Turn(**{**fields, **changes})


def trajectory(*turns: Turn, truncated: bool = False) -> Trajectory:
    return Trajectory("t", 0, TokenSpan((1,)), turns, not truncated, truncated)


def graded(*correct: bool) -> list[Trajectory]:
    return [trajectory(turn(info={"correct": each})) for each in correct]


# -------------------------------------------------------------------------------------- ratios


@pytest.mark.parametrize("count", [1, 2, 5, 100])
def test_quantiles_are_numpys(count):
    log_ratios = np.random.default_rng(count).normal(0, 0.5, count)
    found = ratio_quantiles(torch.from_numpy(log_ratios))
    expected = np.quantile(np.exp(log_ratios), [0.02, 0.5, 0.98])
    assert [found[f"ratio/p{p}"] for p in (2, 50, 98)] == pytest.approx(expected, rel=1e-12)


def test_a_ratio_beyond_all_bounds_is_clamped_as_in_the_loss():
    found = ratio_quantiles(torch.tensor([-1000.0, 0.0, 1000.0]))
    assert found["ratio/p50"] == 1
    assert 0 < found["ratio/p2"] < found["ratio/p98"] < math.exp(20)


# ------------------------------------------------------------------------------------- rollouts


def test_a_step_is_described_by_its_turns_and_trajectories():
    tool = {"tool_calls": 1}
    first = trajectory(
        turn(3, info=tool, policy_version=4, timing={"generate": 1.0, "tool": 0.5}),
        turn(
            2,
            info=tool,
            policy_version=5,
            outcome=Outcome.TOOL_ERROR,
            timing={"generate": 1.0, "tool": 1.0},
        ),
        turn(1, reward=1.0, policy_version=5),
    )
    second = trajectory(turn(4, info={"void": True}, policy_version=5), truncated=True)
    groups = [
        TrajectoryGroup("a", 0, (first, second), num_failed=1),
        TrajectoryGroup("b", 1, (second, second)),
    ]
    metrics = rollout_metrics(groups, step=6)
    assert metrics == {
        "rollout/reward": 0.25,
        "rollout/turns": 1.5,
        "rollout/traces": 1.0,
        "rollout/tool_calls": 0.5,
        "rollout/void_turns": 0.5,
        "rollout/truncated": 0.75,
        "rollout/overlong": 0.75,
        "rollout/zero_signal_groups": 1,
        "rollout/refills": 0,
        "rollout/failed": 1,
        "difficulty/none": 0.5,
        "difficulty/some": 0.5,
        "difficulty/all": 0,
        "difficulty/solved": 0.25,
        "staleness/mean": pytest.approx((3 * 2 + (2 + 1 + 3 * 4) * 1) / 18),
        "staleness/max": 2,
        "staleness/versions": 2,
        "staleness/mixed": 0.25,
        "staleness/mixed_turns": 0,
        "staleness/share_1": pytest.approx(15 / 18),
        "staleness/share_2": pytest.approx(3 / 18),
        "tokens/generated": 6 + 3 * 4,
        "time/generate": 0.5,
        "time/tool": 0.375,
        "outcome/ok": 5,
        "outcome/tool_error": 1,
        "outcome/tool_timeout": 0,
        "outcome/resource_limit": 0,
        "outcome/infra_error": 0,
        "outcome/grader_error": 0,
        "outcome/cancelled": 0,
    }


def test_what_an_agent_said_in_other_conversations_counts_for_its_episode():
    said = turn(4, info={"tool_calls": 2}, policy_version=5, outcome=Outcome.TOOL_ERROR)
    other = trajectory(said)
    episode = replace(trajectory(turn(3, policy_version=6)), branches=(other,))
    metrics = rollout_metrics([TrajectoryGroup("a", 0, (episode, episode))], step=6)
    assert (metrics["rollout/turns"], metrics["rollout/tool_calls"]) == (2, 2)
    assert (metrics["tokens/generated"], metrics["outcome/tool_error"]) == (14, 2)
    assert metrics["staleness/mean"] == pytest.approx(4 / 7)


def test_groups_that_were_replaced_count_as_sampled_but_not_as_trained_on():
    kept = TrajectoryGroup("a", 0, (trajectory(turn(reward=1.0)), trajectory(turn())))
    stale = turn(3, policy_version=-5)
    metrics = rollout_metrics(
        [kept], 0, replaced=[TrajectoryGroup("b", 1, (trajectory(stale),) * 2)]
    )
    assert metrics["rollout/reward"] == 0.25
    assert metrics["tokens/generated"] == 2 + 6
    assert (metrics["rollout/refills"], metrics["rollout/zero_signal_groups"]) == (1, 1)
    assert metrics["staleness/max"] == 0


def test_each_part_of_the_rewards_is_averaged_over_trajectories():
    shaped = trajectory(turn(), turn(info={"rewards": {"answer": 1.0, "format": 0.1}}))
    metrics = reward_part_metrics([shaped, trajectory(turn(info={"rewards": {"answer": 0.0}}))])
    assert metrics == {"reward/answer": 0.5, "reward/format": 0.05}
    assert reward_part_metrics([trajectory(turn())]) == {}


def test_staleness_counts_the_tokens_of_each_version_in_a_turn():
    spans = (VersionSpan(4, 0, 1), VersionSpan(6, 1, 4))
    mixed = trajectory(turn(4, policy_version=4, version_spans=spans), turn(4, policy_version=6))
    metrics = staleness_metrics([mixed, trajectory(turn(2, policy_version=6))], step=7)
    assert metrics == {
        "staleness/mean": pytest.approx((1 * 3 + (3 + 4 + 2) * 1) / 10),
        "staleness/max": 3,
        "staleness/versions": 2,
        "staleness/mixed": 0.5,
        "staleness/mixed_turns": pytest.approx(1 / 3),
        "staleness/share_1": pytest.approx(0.9),
        "staleness/share_3": pytest.approx(0.1),
    }


def test_very_old_tokens_share_one_key():
    old = trajectory(*(turn(policy_version=version) for version in (0, 1, 30)))
    metrics = rollout_metrics([TrajectoryGroup("a", 0, (old,))], 30)
    assert {key: value for key, value in metrics.items() if "share" in key} == {
        "staleness/share_0": pytest.approx(1 / 3),
        "staleness/share_8": pytest.approx(2 / 3),
    }
    assert metrics["staleness/max"] == 30


# ----------------------------------------------------------------------------------- evaluation


def test_accuracy_is_the_mean_over_tasks_and_pass_at_k_counts_tasks():
    samples = [graded(True, False, False, False), graded(False, False), graded(True, True)]
    metrics = evaluation_metrics(samples, [])
    assert metrics["eval/accuracy"] == pytest.approx((1 / 4 + 0 + 1) / 3)
    assert metrics["eval/pass_at_k"] == pytest.approx(2 / 3)
    assert metrics["eval/tasks"] == 3
    assert "eval/greedy_accuracy" not in metrics


def test_pass_at_k_of_k_samples_equals_brute_force():
    rng = np.random.default_rng(0)
    verdicts = rng.random((20, 4)) < 0.2
    metrics = evaluation_metrics([graded(*row) for row in verdicts.tolist()], [])
    chosen = [
        any(row[index] for index in subset)
        for row in verdicts
        for subset in combinations(range(4), 4)
    ]
    assert metrics["eval/pass_at_k"] == pytest.approx(np.mean(chosen))
    assert metrics["eval/accuracy"] == pytest.approx(verdicts.mean())


def test_a_task_that_lost_all_its_trajectories_is_left_out():
    metrics = evaluation_metrics([graded(True), []], graded(True, False))
    assert (metrics["eval/accuracy"], metrics["eval/tasks"]) == (1.0, 1)
    assert metrics["eval/greedy_accuracy"] == 0.5


def test_an_evaluation_that_lost_everything_has_no_accuracy():
    metrics = evaluation_metrics([[], []], ())
    assert metrics["eval/tasks"] == 0
    assert not any(name.endswith(("accuracy", "pass_at_k")) for name in metrics)


@pytest.mark.parametrize(
    ("info", "reward", "expected"),
    [
        ({"correct": True}, 0.0, True),
        ({"correct": False}, 1.0, False),
        ({"correct": None}, 1.0, True),
        ({}, 0.5, True),
        ({}, 0.0, False),
        ({}, -1.0, False),
    ],
)
def test_the_environments_verdict_goes_before_the_reward(info, reward, expected):
    assert is_correct(trajectory(turn(info=info, reward=reward))) is expected


def test_an_answer_graded_in_an_earlier_turn_is_not_the_verdict():
    assert not is_correct(trajectory(turn(info={"correct": True}), turn(info={"correct": False})))


# ------------------------------------------------------------------------------- the mismatch


PROXIMAL = [[-0.15, -1.10, -0.55, -1.80], [-0.60, -0.45, math.nan, math.nan]]
ROLLOUT = [[-0.30, -1.00, -0.40, -2.60], [-1.50, -0.90, math.nan, math.nan]]
MASK = [[True, True, False, True], [True, True, False, False]]


def golden_mismatch(*sequences: int) -> LossInputs:
    proximal, rollout = (torch.tensor(rows, dtype=torch.float64) for rows in (PROXIMAL, ROLLOUT))
    rows = [*sequences]
    return LossInputs(
        logprobs=proximal[rows],
        rollout_logprobs=rollout[rows],
        advantages=torch.tensor([1.0, -1.0])[rows],
        loss_mask=torch.tensor(MASK)[rows],
        turn_ids=torch.tensor([[0, 0, -1, 1], [0, 0, -1, -1]])[rows],
    )


@pytest.mark.parametrize("split", [[(0, 1)], [(0,), (1,)]])
def test_mismatch_of_the_golden_vector_however_it_is_split(split):
    summaries = [summarise(golden_mismatch(*sequences)) for sequences in split]
    metrics = mismatch_metrics(functools.reduce(operator.add, summaries))
    expected = {
        "mismatch/kl": -0.44,
        "mismatch/k3": 0.2240255772,
        "mismatch/chi2": 2.1261745121,
        "mismatch/ess": 0.8857410585,
        "mismatch/proximal_perplexity": (2.7639661710 + 1.6904588484) / 2,
        "mismatch/rollout_perplexity": (3.6692966676 + 3.3201169227) / 2,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    weights = np.array([2.3396468519, 3.8574255307])
    assert metrics["mismatch/p98"] == pytest.approx(np.quantile(weights, 0.98), rel=1e-6)
    assert metrics["mismatch/sequence_chi2"] == pytest.approx((weights**2).mean() - 1, rel=1e-6)


def test_equal_policies_have_no_mismatch():
    inputs = golden_mismatch(0, 1)
    metrics = mismatch_metrics(summarise(replace(inputs, logprobs=inputs.rollout_logprobs)))
    assert (metrics["mismatch/kl"], metrics["mismatch/chi2"], metrics["mismatch/ess"]) == (0, 0, 1)
