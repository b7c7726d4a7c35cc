"""Reward functions of a user: what they are called with, and what becomes of their mistakes."""

import textwrap
import time

import gymnasium
import pytest

from tir_alp.envs import reward_functions
from tir_alp.envs.grader_pool import GraderPool
from tir_alp.envs.reward_functions import RewardFunction, read_rewards
from tir_alp.tools.outcome import Outcome

FUNCTIONS = """
    import os
    import time


    def right(question, answer, completion, *, final_answer, **_):
        return final_answer == answer


    def length(question, answer, completion, **_):
        return len(completion)


    def row(question, answer, completion, *, task, **_):
        return task["level"] + (question == task["question"])


    def raises(question, answer, completion, **_):
        return 1 / 0


    def nothing(question, answer, completion, **_):
        return None


    def text(question, answer, completion, **_):
        return "1.0"


    def not_finite(question, answer, completion, **_):
        return float("nan")


    def endless(question, answer, completion, **_):
        while True:
            pass


    def dies(question, answer, completion, **_):
        os._exit(3)


    NUMBER = 3
"""
TASK = {"task_id": "row/7", "question": "What is 6*7?", "answer": "42", "level": 2}
BAD = ("raises", "nothing", "text", "not_finite", "endless", "dies")


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(textwrap.dedent(FUNCTIONS))
    monkeypatch.syspath_prepend(tmp_path)
    short = GraderPool(num_workers=1, judge_file=reward_functions._pool.judge_file, deadline_s=1.0)
    monkeypatch.setattr(reward_functions, "_pool", short)
    yield
    short.close()


def play(action, *rewards, id="SingleTurnMath-v0", **settings):
    env = gymnasium.make(f"tir_alp.envs:{id}", rewards=list(rewards), **settings)
    env.reset(options={"task": TASK})
    return env.step(action)


def test_the_last_turn_is_graded_by_the_weighted_sum():
    half = {"function": "my_rewards:length", "weight": 0.5}
    _, reward, terminated, truncated, info = play(r"It is \boxed{42}", "my_rewards:right", half)
    assert info["rewards"] == {"my_rewards:right": 1.0, "my_rewards:length": 0.5 * 16}
    assert (reward, terminated, truncated, info["correct"]) == (9.0, True, False, True)
    _, reward, _, _, info = play(r"\boxed{41}", "my_rewards:right")
    assert (reward, info["correct"]) == (0.0, False)


def test_a_text_without_an_answer_is_graded_too():
    _, reward, terminated, _, info = play("forty-two", "my_rewards:length", "my_rewards:right")
    assert (reward, terminated, info["void"]) == (9.0, True, False)
    assert info["rewards"] == {"my_rewards:length": 9.0, "my_rewards:right": 0.0}


def test_the_form_is_shaped_as_before():
    shaping = {"format": 0.25}
    terms = [
        play(text, "my_rewards:length", shaping=shaping)[4]["rewards"]["format"]
        for text in ("42", r"\boxed{42}")
    ]
    assert terms == [0.0, 0.25]


def test_the_whole_row_is_there():
    assert play("x", "my_rewards:row")[1] == 3.0


def test_a_tool_call_is_not_graded_and_the_turn_after_it_is():
    env = gymnasium.make(
        "tir_alp.envs:PythonMath-v0", rewards=["my_rewards:length"], sandbox={"preload": []}
    )
    env.reset(options={"task": TASK})
    observation, reward, terminated, _, _ = env.step("```python\nprint(6*7)\n```")
    assert (observation, reward, terminated) == ("42", 0.0, False)
    assert env.step("42")[1:3] == (2.0, True)
    env.close()


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_is_a_failure_of_the_grader_that_names_function_and_task(name):
    began = time.monotonic()
    _, reward, terminated, truncated, info = play("x", f"my_rewards:{name}")
    assert time.monotonic() - began < 20
    assert (reward, terminated, truncated, info["rewards"]) == (0.0, False, True, {})
    assert info["outcome"] == Outcome.GRADER_ERROR and info["correct"] is None
    assert f"my_rewards:{name}" in info["error"] and "'row/7'" in info["error"]
    reason = {
        "raises": "ZeroDivisionError: division by zero (my_rewards.py, line 19)",
        "nothing": "returned None, which is not a number",
        "text": "returned '1.0', which is not a number",
        "not_finite": "returned nan, which is not finite",
        "endless": "within 1 s",
        "dies": "status 3",
    }
    assert reason[name] in info["error"]
    assert play("xyz", "my_rewards:length")[1] == 3.0  # the next one is graded


@pytest.mark.parametrize(
    ("rewards", "reason"),
    [
        ("my_rewards:right", r"rewards is a list"),
        (["my_rewards.right"], r"rewards\[0\] is 'my_rewards.right', which is not of the form"),
        (["my_rewards:right", "my_rewards:wrong"], r"rewards\[1\]: .* no function 'wrong'"),
        (["my_rewards:NUMBER"], "no function 'NUMBER'"),
        (["no_such_module:right"], "cannot import 'no_such_module'"),
        ([{"function": "my_rewards:right", "wieght": 2}], r"rewards\[0\] is \{"),
        ([{"function": "my_rewards:right", "weight": "2"}], "weight is '2'"),
        (["my_rewards:right", "my_rewards:right"], "names a function twice"),
    ],
)
def test_a_wrong_setting_is_named(rewards, reason):
    with pytest.raises(ValueError, match=reason):
        read_rewards(rewards)


def test_a_setting_is_read():
    assert read_rewards(["my_rewards:right", {"function": "my_rewards:row", "weight": -1}]) == (
        RewardFunction("my_rewards:right"),
        RewardFunction("my_rewards:row", -1.0),
    )
