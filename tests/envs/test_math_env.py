import warnings

import gymnasium
import pytest
from gymnasium.utils.env_checker import check_env

from tir_alp.envs.tasks import ArithmeticTasks, ReasoningGymTasks

ID = "tir_alp.envs:PythonMath-v0"


@pytest.fixture
def env():
    env = gymnasium.make(ID)
    yield env
    env.close()


def test_gymnasiums_checker_finds_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gymnasium.make(ID)
        check_env(env.unwrapped, skip_render_check=True)
        env.close()


def test_the_same_seeds_give_the_same_episodes(env):
    first = [env.reset(seed=7)[0], env.reset()[0]]
    assert [env.reset(seed=7)[0], env.reset()[0]] == first
    assert first[0] != first[1]


def test_an_episode_with_the_tool(env):
    env.reset(options={"task": {"question": "What is 6*7?", "answer": "42"}})
    observation, reward, terminated, truncated, info = env.step("```python\nx = 6 * 7\n```")
    assert (reward, terminated, truncated, info["outcome"]) == (0.0, False, False, "ok")
    observation, *_, info = env.step("```python\nprint(x)\n```")
    assert observation.strip() == "42"
    assert info["tool_calls"] == 1 and info["tool_s"] > 0
    _, reward, terminated, truncated, info = env.step(r"So it is \boxed{42}.")
    assert (reward, terminated, truncated, info["correct"]) == (1.0, True, False, True)


def test_every_episode_starts_with_a_fresh_interpreter(env):
    task = {"task": {"question": "What is 6*7?", "answer": "42"}}
    env.reset(options=task)
    env.step("```python\nx = 1\n```")
    env.reset(options=task)
    observation, *_, info = env.step("```python\nprint(x)\n```")
    assert "NameError" in observation
    assert info["outcome"] == "tool_error"


@pytest.mark.parametrize(
    "tasks",
    [ArithmeticTasks(0, 20), ReasoningGymTasks("fraction_simplification", seed=0, size=20)],
    ids=["arithmetic", "reasoning_gym"],
)
def test_gold_answers_score_one_and_wrong_ones_zero(env, tasks):
    for task in tasks:
        env.reset(options={"task": task})
        assert env.step(f"\\boxed{{{task['answer']}}}")[1] == 1.0
        env.reset(options={"task": task})
        assert env.step("\\boxed{-1000001}")[1] == 0.0


def test_boxing_the_question_does_not_score(env):
    task = {"question": "What is 37*48+112?", "answer": "1888"}
    env.reset(options={"task": task})
    assert env.step(r"\boxed{37*48+112}")[1] == 0.0


def test_the_instruction_stands_before_the_question():
    task = {"task": {"question": "6*7?", "answer": "42"}}
    by_default = gymnasium.make(ID).reset(options=task)[0]
    assert "```python" in by_default and "\\boxed{}" in by_default
    assert by_default.endswith("\n\n6*7?")
    assert gymnasium.make(ID, instruction="Go:").reset(options=task)[0] == "Go:\n\n6*7?"
    assert gymnasium.make(ID, instruction="").reset(options=task)[0] == "6*7?"


def test_turns_are_limited_by_a_keyword():
    env = gymnasium.make(ID, max_turns=1)
    env.reset(seed=0)
    assert env.step("```python\nprint(1)\n```")[2:4] == (False, True)
    env.close()


def test_tasks_of_ones_own_are_drawn():
    env = gymnasium.make(ID, instruction="", tasks=[{"question": "1+1?", "answer": 2}])
    assert env.reset(seed=0)[0] == "1+1?"
    assert env.step(r"\boxed{2}")[1] == 1.0


def test_a_task_without_an_answer_is_refused(env):
    with pytest.raises(ValueError, match=r"needs 'answer'; this one has only \['question'\]"):
        env.reset(options={"task": {"question": "1+1?"}})
