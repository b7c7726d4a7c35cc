import re

import pytest

from tir_alp.envs.tasks import ArithmeticTasks, ReasoningGymTasks, arithmetic_task
from tir_alp.tools.held_out import is_held_out


def test_an_arithmetic_task_follows_from_seed_and_index():
    assert arithmetic_task(0, 7) == arithmetic_task(0, 7)
    assert arithmetic_task(0, 7) != arithmetic_task(0, 8)
    assert arithmetic_task(0, 7) != arithmetic_task(1, 7)


def test_arithmetic_tasks_stay_what_they_are_between_versions():
    assert arithmetic_task(0, 0) == {
        "task_id": "arithmetic/train/0/0",
        "question": "What is 13*69+400?",
        "answer": "1297",
    }


def test_the_answers_are_right_and_the_questions_short():
    for index in range(500):
        task = arithmetic_task(3, index)
        parts = re.fullmatch(r"What is (\d\d)\*(\d\d)([+-])(\d\d\d)\?", task["question"])
        assert parts is not None
        a, b, c = int(parts[1]), int(parts[2]), int(parts[4])
        assert task["answer"] == str(a * b + c if parts[3] == "+" else a * b - c)


def test_the_operands_and_signs_spread_over_their_ranges():
    questions = [task["question"] for task in ArithmeticTasks(seed=0, size=3000)]
    numbers = [list(map(int, re.findall(r"\d+", question))) for question in questions]
    assert min(row[0] for row in numbers) == 11
    assert max(row[1] for row in numbers) == 99
    assert min(row[2] for row in numbers) < 105 and max(row[2] for row in numbers) > 994
    assert 1350 < sum("+" in question for question in questions) < 1650


def test_no_question_is_in_both_splits():
    train = {ArithmeticTasks(0, 3000)[index]["question"] for index in range(3000)}
    held_out = {ArithmeticTasks(9, 500, "held_out")[index]["question"] for index in range(500)}
    assert not any(map(is_held_out, train))
    assert all(map(is_held_out, held_out))


def test_one_question_in_eight_is_held_out():
    assert 1100 < sum(is_held_out(f"question {n}") for n in range(10_000)) < 1400


def test_a_lone_surrogate_is_in_some_split():
    assert is_held_out("\ud800") in (True, False)


def test_an_index_outside_is_an_index_error():
    for index in (-1, 3):
        with pytest.raises(IndexError, match=f"task {index} of 3"):
            ArithmeticTasks(0, 3)[index]


def test_reasoning_gym_gives_its_own_questions_and_answers():
    task = ReasoningGymTasks("gcd", seed=3, size=10)[4]
    assert task == ReasoningGymTasks("gcd", seed=3, size=10)[4]
    assert set(task) == {"task_id", "question", "answer", "dataset", "metadata"}
    assert task["dataset"] == "gcd"
    assert task["task_id"].startswith("reasoning_gym/gcd/3/")
    assert "Greatest Common Divisor" in task["question"]
    assert task["answer"].isdigit()


def test_reasoning_gym_shares_no_question_between_splits():
    train = ReasoningGymTasks("gcd", seed=3, size=50)
    held_out = ReasoningGymTasks("gcd", seed=3, size=20, split="held_out")
    assert not any(is_held_out(train[index]["question"]) for index in range(50))
    assert all(is_held_out(held_out[index]["question"]) for index in range(20))
    assert len({held_out[index]["task_id"] for index in range(20)}) == 20


def test_a_data_set_that_reasoning_gym_does_not_have_is_reported():
    with pytest.raises(ValueError, match=r"no data set 'gdc'; it has: .*gcd"):
        ReasoningGymTasks("gdc", seed=0, size=10)
