import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tir_alp.algorithm import advantage_rules as rules
from tir_alp.algorithm.advantage import ADVANTAGES, group_advantages, has_signal, length_penalty
from tir_alp.algorithm.advantage_rules import dr_grpo, grpo
from tir_alp.algorithm.presets import ALGORITHMS
from tir_alp.config import RolloutConfig
from tir_alp.tools.outcome import Outcome
from tir_alp.types import StopReason, TokenSpan, Trajectory, TrajectoryGroup, Turn

REWARDS = st.lists(st.floats(-1e3, 1e3, allow_nan=False), min_size=2, max_size=16)


def test_golden_group():
    expected = 0.8660239038
    assert grpo([1, 0, 0, 1]) == pytest.approx([expected, -expected, -expected, expected], rel=1e-9)
    assert dr_grpo([1, 0, 0, 1]) == (0.5, -0.5, -0.5, 0.5)


@given(REWARDS)
@settings(deadline=None)
def test_equal_numpy_with_ddof_1(rewards):
    r = np.array(rewards)
    assert dr_grpo(rewards) == pytest.approx(r - r.mean(), abs=1e-9)
    if r.std(ddof=1) > 1e-9:
        expected = (r - r.mean()) / (r.std(ddof=1) + 1e-6)
        assert grpo(rewards) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@given(REWARDS)
@settings(deadline=None)
def test_sum_to_zero(rewards):
    assert math.fsum(dr_grpo(rewards)) == pytest.approx(0, abs=1e-9)
    assert math.fsum(grpo(rewards)) == pytest.approx(0, abs=1e-6)


def advantages_of(name: str, rewards: list[float]) -> tuple[float, ...]:
    """The advantages of a step of one group, whose trajectories have 3, 4, 5, ... tokens."""
    entry = ADVANTAGES[name]
    lengths = [*range(3, 3 + len(rewards))]
    values = {"lengths": lengths, "components": {"answer": rewards, "format": rewards}}
    found = entry.function(rewards, **{key: values[key] for key in entry.reads})
    return rules.whitened([found], [lengths])[0] if entry.is_whitened else found


@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.parametrize("reward", [0.1, 1 / 3, 1e8 + 0.1, 0.0, -2.7])
def test_an_all_equal_group_is_exactly_zero(name, reward):
    for size in range(2, 20):
        assert advantages_of(name, [reward] * size) == (0.0,) * size


def test_a_group_of_one_keeps_its_reward():
    assert grpo([0.7]) == (0.7 / (1 + 1e-6),)
    assert dr_grpo([0.7]) == (0.7,)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_an_empty_group_has_no_advantages(name):
    assert advantages_of(name, []) == ()


@given(REWARDS, st.data())
@settings(deadline=None)
def test_rules_equal_numpy(rewards, data):
    r = np.array(rewards)
    size = len(r)
    lengths = np.array(data.draw(st.lists(st.integers(1, 50), min_size=size, max_size=size)))
    others = (r.sum() - r) / (size - 1)
    assert rules.rloo(rewards) == pytest.approx(r - others, abs=1e-8)
    baseline = (lengths * r).sum() / lengths.sum()
    assert rules.opo(rewards, lengths=lengths.tolist()) == pytest.approx(r - baseline, abs=1e-8)
    positive = np.abs(r) + 0.1
    expected = (positive - positive.mean()) / positive.mean()
    assert rules.max_rl(positive.tolist()) == pytest.approx(expected, abs=1e-9)
    if r.std(ddof=1) > 1e-9:
        lead = np.where(r == r.max(), np.sort(r)[-1] - np.sort(r)[-2], 0) / (r.std(ddof=1) + 1e-6)
        assert rules.best_of_group(rewards) == pytest.approx(lead, rel=1e-6, abs=1e-6)
        other = r[::-1] * 3
        both = rules.gdpo(rewards, components={"a": rewards, "b": other.tolist()})
        z = [(each - each.mean()) / (each.std(ddof=1) + 1e-6) for each in (r, other)]
        assert both == pytest.approx(z[0] + z[1], rel=1e-4, abs=1e-4)
    tokens = np.repeat(r, lengths)
    if tokens.std() > 1e-6:
        wanted = (r - tokens.mean()) / np.sqrt(tokens.var(ddof=1) + 1e-8)
        found = rules.whitened([rewards], [lengths.tolist()])[0]
        assert found == pytest.approx(wanted, rel=1e-6, abs=1e-6)


def test_whitening_leaves_trajectories_without_loss_tokens_out():
    found = rules.whitened([[1.0, 0.0], [50.0]], [[2, 2], [0]])
    one, other = rules.whitened([[1.0, 0.0]], [[2, 2]])[0]
    assert found[0] == (one, other) == (pytest.approx(0.866, abs=1e-3), pytest.approx(-0.866, 1e-3))


def test_turns_are_compared_with_turns_that_began_in_the_same_state():
    """Three trajectories: all begin alike, two of them see the same output."""
    rewards, states = [[0.0, 1.0], [0.0, 0.0], [0.5]], [["p", "x"], ["p", "x"], ["p"]]
    found = rules.turn_advantages(rewards, states, discount=0.5)
    first = rules.grpo([0.5, 0.0, 0.5])
    second = rules.grpo([1.0, 0.0])
    assert found == [(first[0], second[0]), (first[1], second[1]), (first[2],)]
    assert rules.turn_advantages([[1.0]], [["p"]], discount=1.0) == [(0.0,)]


def test_every_preset_names_an_advantage():
    assert {algorithm.advantage for algorithm in ALGORITHMS.values()} <= set(ADVANTAGES)


# ---------------------------------------------------------------------------- groups and limits


def played(reward: float, num_tokens: int = 4, *, cut: bool = False, trainable: bool = True):
    """Return a trajectory with a prompt of one token, and one turn."""
    written = num_tokens - 1
    turn = Turn(
        completion=TokenSpan((7,) * written, (-0.1,) * written, trainable),
        observation=TokenSpan(()),
        policy_version=0,
        stop_reason=StopReason.LENGTH if cut else StopReason.EOS,
        outcome=Outcome.OK,
        reward=reward,
    )
    return Trajectory("t", 0, TokenSpan((1,)), (turn,), True, False)


def advantages(*trajectories: Trajectory, **limits) -> tuple[float, ...]:
    group = TrajectoryGroup("t", 0, trajectories)
    settings = RolloutConfig.model_validate(
        {"max_context_tokens": 100, "max_turn_tokens": 50} | limits
    )
    return group_advantages(group, ALGORITHMS["dr_grpo"], settings)


def test_the_advantages_of_a_group_are_those_of_its_rewards():
    assert advantages(played(1.0), played(0.0)) == (0.5, -0.5)
    group = TrajectoryGroup("t", 0, (played(1.0), played(0.0), played(0.0)))
    assert group_advantages(group, ALGORITHMS["grpo"], RolloutConfig()) == grpo([1, 0, 0])


def test_an_overlong_trajectory_counts_in_its_group_and_can_then_get_0():
    three = (played(1.0, cut=True), played(1.0), played(0.0))
    kept = advantages(*three)
    assert kept == pytest.approx((1 / 3, 1 / 3, -2 / 3))
    assert advantages(*three, overlong="zero_advantage") == (0.0, *kept[1:])
    assert advantages(*three, overlong="mask_trajectory") == kept  # it is masked elsewhere


@pytest.mark.parametrize(
    ("num_tokens", "penalty"), [(1, 0), (80, 0), (85, -0.25), (90, -0.5), (100, -1), (130, -1)]
)
def test_the_penalty_falls_over_the_buffer_and_no_further(num_tokens, penalty):
    assert length_penalty(num_tokens, 100, 20) == penalty
    assert length_penalty(num_tokens, 100, 0) == 0


def test_a_long_answer_earns_less_and_the_reward_itself_stays():
    long = played(1.0, 90)
    assert advantages(long, played(1.0, 10), overlong_buffer_tokens=20) == (-0.25, 0.25)
    assert advantages(long, played(1.0, 10)) == (0.0, 0.0)
    assert long.reward == 1.0


@pytest.mark.parametrize(
    ("trajectories", "expected"),
    [
        ((played(1.0), played(0.0)), True),
        ((played(1.0), played(1.0)), False),
        ((played(1.0, trainable=False), played(0.0, trainable=False)), False),
        ((played(1.0), played(0.0, trainable=False)), True),
        ((played(0.0),), False),
        ((played(1.0),), True),
    ],
)
def test_a_group_has_signal_where_a_token_of_the_loss_has_an_advantage(trajectories, expected):
    assert has_signal(TrajectoryGroup("t", 0, trajectories), advantages(*trajectories)) is expected


def test_zeroed_advantages_are_no_signal():
    two = (played(1.0, cut=True), played(0.0, cut=True))
    found = advantages(*two, overlong="zero_advantage")
    assert not has_signal(TrajectoryGroup("t", 0, two), found)
