import json

import pytest
from pydantic import ValidationError

from tir_alp.config import DataConfig
from tir_alp.data import (
    Task,
    TaskOrder,
    load_held_out,
    load_source,
    read_jsonl,
)
from tir_alp.envs.tasks import is_held_out

ROWS = [
    {"task_id": f"t{number}", "question": f"q{number}", "answer": str(number)}
    for number in range(10)
]


def ids(order, start, stop):
    return [order[position].task_id for position in range(start, stop)]


def write(path, *lines):
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


# ----------------------------------------------------------------------------------- order


def test_an_epoch_holds_every_task_once_and_the_next_in_another_order():
    order = TaskOrder(ROWS, seed=0)
    first, second = ids(order, 0, 10), ids(order, 10, 20)
    assert sorted(first) == sorted(second) == [f"t{number}" for number in range(10)]
    assert first != second


def test_the_order_follows_the_seed():
    assert ids(TaskOrder(ROWS, seed=0), 0, 30) == ids(TaskOrder(ROWS, seed=0), 0, 30)
    assert ids(TaskOrder(ROWS, seed=0), 0, 30) != ids(TaskOrder(ROWS, seed=1), 0, 30)


@pytest.mark.parametrize("position", [0, 3, 9, 10, 11, 25])
def test_a_position_is_all_that_a_resume_needs(position):
    whole = ids(TaskOrder(ROWS, seed=0), 0, 40)
    assert ids(TaskOrder(ROWS, seed=0), position, 40) == whole[position:]


def test_no_tasks_are_an_error():
    with pytest.raises(ValueError, match="no tasks to train on"):
        TaskOrder([], seed=0)


def test_a_task_reaches_the_environment_as_the_row_it_was():
    row = {"task_id": "a", "question": "1+1?", "answer": "2", "level": 3}
    task = Task.from_row(row)
    assert task == Task("a", question="1+1?", answer="2", metadata={"level": 3})
    assert task.to_options() == {"task": row}


# --------------------------------------------------------------------------------- sources


def test_arithmetic_is_the_default_and_shares_no_question_with_the_held_out_set():
    config = DataConfig(num_tasks=500)
    train = [TaskOrder(load_source(config), seed=0)[index] for index in range(500)]
    held_out = load_held_out(config, 64)
    assert len({task.task_id for task in train}) == 500
    assert len({task.question for task in held_out}) == 64
    assert not {task.question for task in train} & {task.question for task in held_out}


def test_the_held_out_set_is_the_same_every_time_and_a_larger_one_contains_it():
    assert load_held_out(DataConfig(), 64)[:16] == load_held_out(DataConfig(), 16)


def test_reasoning_gym_is_loaded_by_name():
    config = DataConfig(source="reasoning_gym", dataset="gcd", num_tasks=20)
    assert len(load_source(config)) == 20
    (task,) = load_held_out(config, 1)
    assert task.task_id.startswith("reasoning_gym/gcd/0/") and is_held_out(task.question)


def test_a_file_is_split_by_its_questions(tmp_path):
    rows = [json.dumps({"question": f"q{n}", "answer": n}) for n in range(100)]
    config = DataConfig(source="jsonl", path=write(tmp_path / "tasks.jsonl", *rows))
    train = {row["question"] for row in load_source(config)}
    held_out = {task.question for task in load_held_out(config, 100 - len(train))}
    assert train | held_out == {f"q{n}" for n in range(100)}
    assert 5 <= len(held_out) <= 20


def test_too_few_held_out_tasks_are_an_error_that_says_how_many_there_are(tmp_path):
    rows = [json.dumps({"question": f"q{n}", "answer": n}) for n in range(100)]
    config = DataConfig(source="jsonl", path=write(tmp_path / "tasks.jsonl", *rows))
    with pytest.raises(ValueError, match=r"has \d+ held-out tasks .* not 64: evaluate on at most"):
        load_held_out(config, 64)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "jsonl"}, "'jsonl' needs a path"),
        ({"source": "reasoning_gym"}, "'reasoning_gym' needs a dataset"),
        ({"path": "tasks.jsonl"}, "'arithmetic' does not take a path"),
        ({"source": "jsonl", "path": "a", "dataset": "gcd"}, "'jsonl' does not take a dataset"),
        ({"source": "csv"}, "'arithmetic', 'reasoning_gym' or 'jsonl'"),
        ({"num_tasks": 0}, "greater than or equal to 1"),
        ({"sorce": "jsonl"}, "Extra inputs are not permitted"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        DataConfig(**settings)


# ----------------------------------------------------------------------------------- files


def test_rows_are_read_with_their_other_columns(tmp_path):
    path = write(
        tmp_path / "tasks.jsonl",
        '{"task_id": 7, "question": "1+1?", "answer": "2", "level": 3}',
        "",
        '{"question": "1/2?", "answer": 0.5}',
    )
    assert read_jsonl(path) == [
        {"task_id": "7", "question": "1+1?", "answer": "2", "level": 3},
        {"task_id": "tasks.jsonl:3", "question": "1/2?", "answer": "0.5"},
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "1+1?"', "not JSON"),
        ("\\xff", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "not an object"),
        ('{"answer": "2"}', "'question' must be a text that is not empty, not None"),
        ('{"question": " ", "answer": "2"}', "'question' must be a text that is not empty"),
        ('{"question": "1+1?"}', "'answer' must be a text or a number, not None"),
        ('{"question": "1+1?", "answer": true}', "'answer' must be a text or a number, not True"),
        ('{"question": "1+1?", "answer": ""}', "'answer' must be a text or a number"),
    ],
)
def test_a_broken_row_is_named_by_file_and_line(tmp_path, line, message):
    path = write(tmp_path / "tasks.jsonl", '{"question": "1+1?", "answer": "2"}', line)
    with pytest.raises(ValueError, match=f"tasks.jsonl:2: {message}"):
        read_jsonl(path)


def test_bytes_that_are_no_text_are_named_too(tmp_path):
    path = tmp_path / "tasks.jsonl"
    path.write_bytes(b'{"question": "\xff", "answer": "2"}\n')
    with pytest.raises(ValueError, match=r"tasks\.jsonl:1: not JSON"):
        read_jsonl(path)


def test_a_missing_file_and_an_empty_one_are_clear(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read the tasks in .*none.jsonl: No such file"):
        read_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="holds no tasks"):
        read_jsonl(write(tmp_path / "empty.jsonl", ""))
