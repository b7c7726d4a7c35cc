"""A run that learns nothing says so, with the share, an example and what to change."""

import pytest

from tir_alp.run.advice import Advice
from tir_alp.tools.outcome import Outcome
from tir_alp.types import StopReason, TokenSpan, Trajectory, TrajectoryGroup, Turn


def group(*rewards: float) -> TrajectoryGroup:
    def trajectory(reward: float) -> Trajectory:
        span = TokenSpan((7, 8), (-0.1, -0.2))
        turn = Turn(span, TokenSpan(()), 0, StopReason.EOS, Outcome.OK, reward)
        return Trajectory("t", 0, TokenSpan((1,)), (turn,), True, False, 0)

    return TrajectoryGroup("t", 0, tuple(map(trajectory, rewards)), 0)


def advice() -> Advice:
    return Advice(decode=lambda ids: f"text of {list(ids)}")


HEALTHY = {"rollout/void_turns": 0.1, "tokens/loss": 9.0, "rollout/tool_calls": 1.0}


def test_a_healthy_step_gets_no_advice():
    assert advice().of_step(0, [group(0.0, 1.0), group(0.0, 0.0)], HEALTHY) == []


@pytest.mark.parametrize(
    ("groups", "metrics", "words"),
    [
        ([group(0.0, 0.0)], {}, ("no group of this step had a signal", "all 0", "[7, 8]")),
        ([group(1.0, 1.0), group(0.0, 0.0)], {}, ("equal within each group",)),
        ([group(0.0, 1.0)], {"rollout/void_turns": 0.73}, ("73% of the turns", "[7, 8]")),
        ([group(0.0, 1.0)], {"tokens/loss": 0.0}, ("no token entered the loss",)),
    ],
)
def test_what_keeps_a_step_from_learning_is_named(groups, metrics, words):
    (sentence,) = advice().of_step(0, groups, HEALTHY | metrics)
    assert all(word in sentence for word in words)


def test_a_tool_that_is_never_called_is_named_after_five_steps():
    watched = advice()
    silent = HEALTHY | {"rollout/tool_calls": 0.0}
    said = [watched.of_step(step, [group(0.0, 1.0)], silent) for step in range(6)]
    assert said[:4] == [[]] * 4 and "no tool was called in the last 5 steps" in said[4][0]
    assert said[5] == []  # not in every step


def test_a_run_whose_steps_mostly_taught_nothing_says_so_at_its_end():
    watched = advice()
    for step, rewards in enumerate([(0.0, 1.0), (0.0, 0.0), (1.0, 1.0)]):
        watched.of_step(step, [group(*rewards)], HEALTHY)
    assert watched.at_end().startswith("warning: 2 of 3 steps taught nothing")
    watched.of_step(3, [group(0.0, 1.0)], HEALTHY)
    assert watched.at_end() == "" and advice().at_end() == ""


def test_an_example_is_shown_as_it_is_written():
    watched = Advice(decode=lambda ids: "\\boxed{7}\nso")
    (sentence,) = watched.of_step(0, [group(0.0, 0.0)], HEALTHY)
    assert 'one turn, for example: "\\boxed{7}\\nso".' in sentence


def test_the_same_advice_comes_back_after_a_while():
    watched = advice()
    said = [bool(watched.of_step(step, [group(0.0, 0.0)], HEALTHY)) for step in range(41)]
    assert [step for step, has_advice in enumerate(said) if has_advice] == [0, 20, 40]
