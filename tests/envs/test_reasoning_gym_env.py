import inspect
import re
import sys
from concurrent.futures import ThreadPoolExecutor

import gymnasium
import pytest

from tir_alp.envs import reasoning_gym_env
from tir_alp.envs.grader_pool import GraderPool
from tir_alp.envs.reasoning_gym_env import EVALUATING, is_program
from tir_alp.envs.tasks import ReasoningGymTasks
from tir_alp.tools.outcome import Outcome

ID = "tir_alp.envs:ReasoningGym-v0"
NO_TEXT = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}
"""Data sets whose rows have no answer: many answers are right, and a scorer simulates them."""
OF_OTHERS = {"composite"}
"""This data set mixes others, which have to be named."""


def data_sets():
    from reasoning_gym.factory import DATASETS

    return DATASETS


def plays_gold(env, name):
    task = ReasoningGymTasks(name, seed=0, size=2, split=None)[1]
    prompt, _ = env.reset(options={"task": task})
    _, reward, terminated, _, step = env.step(env.unwrapped.gold_action(task))  # type: ignore[attr-defined]
    fine = prompt == task["question"] and prompt and terminated and reward == 1.0
    return None if fine else f"{name}: {reward} {step['error']} for {task['answer']!r:.80}"


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_data_set_with_a_textual_answer_takes_its_own(monkeypatch, capsys):
    monkeypatch.setattr(reasoning_gym_env._pool, "deadline_s", 60.0)  # on a loaded machine
    assert not (NO_TEXT | OF_OTHERS) - set(data_sets())
    names = sorted(set(data_sets()) - NO_TEXT - OF_OTHERS)
    env = gymnasium.make(ID, instruction="", tasks=[{}], disable_env_checker=True)
    failures = [failure for name in names if (failure := plays_gold(env, name))]
    with capsys.disabled():
        print(f"\n{len(names) - len(failures)} of {len(names)} data sets take their own answer")
    assert failures == []
    assert len(names) == 100


def test_the_excluded_data_sets_have_no_answer():
    from reasoning_gym import create_dataset

    assert {
        name for name in NO_TEXT if create_dataset(name, seed=0, size=1)[0]["answer"] is not None
    } == set()


def test_no_other_scorer_evaluates_its_answer():
    found = {
        name
        for name, (kind, _) in data_sets().items()
        if re.search(
            r"\b(?:eval|exec)\(answer|parse_expr\(answer|sympify\(answer",
            inspect.getsource(sys.modules[kind.__module__]),
        )
        and "def parse_expr" not in inspect.getsource(sys.modules[kind.__module__])
    }
    assert found == EVALUATING


@pytest.mark.parametrize(
    "answer",
    [
        "exec('x')",
        "exec ('x')",
        "[exec][0]('x')",
        "(exec)('x')",
        "\uff45\uff58\uff45\uff43('x')",
        "(exec#\n('x'))",
        "(exec\\\n('x'))",
        "x.__class__",
        "().real",
        "'a'.upper",
        "'a'('b')",
        "1" * 10_001,
    ],
)
def test_answers_that_could_do_more_than_compute_are_programs(answer):
    assert is_program(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "x**2 + 3*(x - 1)",
        "sin(x)/x + C",
        "(1 + 2)*3.5",
        '["A", "B"]',
        "[[1, 0], [0, 1]]",
        "A B\nC",
        "",
    ],
)
def test_honest_answers_are_not_programs(answer):
    assert not is_program(answer)


def test_a_program_for_an_answer_scores_nothing_and_never_runs(monkeypatch):
    monkeypatch.setattr(reasoning_gym_env, "_pool", None)
    env = gymnasium.make(ID, dataset="countdown")
    env.reset(seed=0)
    _, reward, terminated, _, info = env.step("<answer>[exec][0]('1')</answer>")
    assert (reward, terminated, info["correct"]) == (0.0, True, False)
    assert info["error"] == "the answer is a program"


def test_a_partial_score_is_a_reward_but_not_a_right_answer():
    env = gymnasium.make(ID, dataset="countdown")
    env.reset(seed=0)
    _, reward, _, _, info = env.step("<answer>1 + 1</answer>")
    assert (reward, info["correct"]) == (0.05, False)


@pytest.fixture
def impatient(monkeypatch):
    pool = GraderPool(num_workers=1, judge_file=reasoning_gym_env._pool.judge_file, deadline_s=2.0)
    monkeypatch.setattr(reasoning_gym_env, "_pool", pool)
    yield
    pool.close()


@pytest.mark.parametrize("answer", ["9**9**9**9", "(" * 300 + "1" + ")" * 300])
def test_an_answer_that_a_scorer_cannot_evaluate_in_time_is_wrong(impatient, answer):
    env = gymnasium.make(ID, dataset="countdown")
    env.reset(seed=0)
    _, reward, terminated, truncated, info = env.step(f"<answer>{answer}</answer>")
    assert (terminated, truncated, info["correct"], info["outcome"]) == (True, False, False, "ok")
    assert float(reward) <= 0.05


def test_a_task_that_a_scorer_cannot_grade_is_an_error_of_the_grader(impatient):
    task = {"question": "?", "answer": "1", "dataset": "no_such_set", "metadata": {}}
    env = gymnasium.make(ID, tasks=[task])
    env.reset(options={"task": task})
    _, _, terminated, truncated, info = env.step("<answer>1</answer>")
    assert (terminated, truncated, info["correct"]) == (False, True, None)
    assert info["outcome"] == Outcome.GRADER_ERROR


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>1</answer> or <answer> 2 </answer>", "2"),
        ("<answer>a\nb</answer>", "a\nb"),
        ("<answer>1", None),
        ("1</answer>", None),
        ("```text\n<answer>1</answer>\n```", None),
        ("<answer>1</answer></answer>", "1</answer>"),
        (r"\boxed{1}", None),
    ],
)
def test_the_answer_stands_between_tags_in_prose(text, answer):
    env = gymnasium.make(ID).unwrapped
    assert env.answer_in(text) == answer  # type: ignore[attr-defined]


def test_threads_get_their_own_scores():
    tasks = ReasoningGymTasks("gcd", seed=0, size=8)

    def score(index):
        env = gymnasium.make(ID, dataset="gcd", disable_env_checker=True)
        env.reset(options={"task": tasks[index]})
        return env.step(f"<answer>{tasks[index // 2]['answer']}</answer>")[1]

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(score, range(8)))
    expected = [float(tasks[i]["answer"] == tasks[i // 2]["answer"]) for i in range(8)]
    assert found == expected
