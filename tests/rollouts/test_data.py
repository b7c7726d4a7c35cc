import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tir_alp.config import DataConfig
from tir_alp.rollouts.data import Task, TaskOrder, left_out, load_held_out, load_order, load_source
from tir_alp.rollouts.data_files import open_rows
from tir_alp.tools.held_out import is_held_out

ROOT = Path(__file__).parents[2]
ROWS = [
    {"task_id": f"t{number}", "question": f"q{number}", "answer": str(number)}
    for number in range(10)
]


def ids(order, start, stop):
    return [order[position].task_id for position in range(start, stop)]


def read_jsonl(path, **settings: Any):
    """Return all tasks of a file, in its order."""
    splits = open_rows(DataConfig(source="jsonl", path=path, **settings)).splits.values()
    found = [(n, each[index]) for each in splits for index, n in enumerate(each.numbers)]
    return [task for _, task in sorted(found, key=lambda each: each[0])]


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
        ({"path": "tasks.jsonl"}, "not take a path: set source to 'jsonl' or 'csv' or 'parquet'"),
        ({"source": "jsonl", "path": "a", "dataset": "gcd"}, "'jsonl' does not take a dataset"),
        ({"source": "xml"}, "'arithmetic', 'code', 'reasoning_gym', 'word_problems', 'jsonl'"),
        ({"source": "my-tasks:Tasks"}, "or 'my_module:MyTasks' for your own"),
        ({"source": "my_tasks:Tasks", "path": "a"}, "'my_tasks:Tasks' does not take a path"),
        ({"source": "env", "broken_rows": "skip"}, "'env' does not take a broken_rows"),
        ({"source": "jsonl", "path": "a", "subset": "b"}, "'jsonl' does not take a subset"),
        ({"mix": [{"weight": 0}]}, "greater than 0"),
        ({"mix": [{}], "num_tasks": 3}, "num_tasks belongs into each source of mix"),
        ({"num_tasks": 0}, "greater than or equal to 1"),
        ({"sorce": "jsonl"}, "Extra inputs are not permitted"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        DataConfig(**settings)


# ---------------------------------------------------------------------- a source of one's own


FOREIGN = """
from tir_alp.tools.held_out import is_held_out


class Squares:
    def __init__(self, seed, size, split, dataset="small"):
        wanted = split == "held_out"
        numbers = [n for n in range(seed, 40 * size) if is_held_out(f"{n} squared?") == wanted]
        self.numbers, self.dataset = numbers[:size], dataset

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, index):
        n = self.numbers[index]
        return {"task_id": f"{self.dataset}/{n}", "question": f"{n} squared?", "answer": str(n**2)}


class Nameless(Squares):
    def __getitem__(self, index):
        return {"question": "2+2?"}
"""


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    name = f"squares_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(FOREIGN)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_a_source_from_outside_the_package_is_named_by_its_entry_point(foreign):
    config = DataConfig(source=f"{foreign}:Squares", num_tasks=30, seed=4)
    order = load_order(config, seed=0)
    train = {order[position].question for position in range(30)}
    held_out = load_held_out(config, 8)
    assert len(train) == 30 and len(held_out) == 8
    assert not train & {task.question for task in held_out}
    assert held_out[0].task_id.startswith("small/")
    config = DataConfig(source=f"{foreign}:Squares", dataset="large")
    assert load_source(config)[0]["task_id"].startswith("large/")


def test_the_source_that_the_docs_show_works(tmp_path, monkeypatch):
    (code,) = re.findall(r"(?s)```python\n(.*?)```", (ROOT / "docs/data.md").read_text())
    name = f"documented_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    config = DataConfig(source=f"{name}:Squares", num_tasks=100)
    held_out = {task.question for task in load_held_out(config, 10)}
    assert len(held_out) == 10 and not held_out & {row["question"] for row in load_source(config)}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:Squares", "cannot import the task source 'no_such_module:Squares'"),
        ("{foreign}:Cubes", "cannot import the task source .*no attribute 'Cubes'"),
        ("{foreign}:is_held_out", "cannot open the task source .* with seed, size, split: "),
        ("{foreign}:Nameless", "a task of .* has no 'task_id' and no 'answer'"),
    ],
)
def test_a_foreign_source_that_cannot_be_opened_is_named(foreign, name, message):
    config = DataConfig(source=name.format(foreign=foreign))
    with pytest.raises(ValueError, match=message):
        load_source(config)


def test_importing_the_data_registers_no_environment():
    program = (
        "import gymnasium; before = set(gymnasium.registry)\n"
        "import tir_alp.rollouts.data\n"
        "print(set(gymnasium.registry) - before)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


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
        ('{"answer": "2"}', "there is no column 'question'; the row has 'answer'"),
        ('{"question": " ", "answer": "2"}', "'question' must be a text that is not empty"),
        ('{"question": "1+1?"}', "there is no column 'answer'; the row has 'question'"),
        ('{"question": "1+1?", "answer": true}', "'answer' must be a text or a number, not True"),
        ('{"question": "1+1?", "answer": ""}', "'answer' must be a text or a number"),
    ],
)
def test_a_broken_row_is_named_by_file_and_line(tmp_path, line, message):
    path = write(tmp_path / "tasks.jsonl", '{"question": "1+1?", "answer": "2"}', line)
    with pytest.raises(ValueError, match=f"tasks.jsonl:2: {message}"):
        read_jsonl(path)


def test_bytes_that_are_not_text_are_reported_too(tmp_path):
    path = tmp_path / "tasks.jsonl"
    path.write_bytes(b'{"question": "\xff", "answer": "2"}\n')
    with pytest.raises(ValueError, match=r"tasks\.jsonl:1: not JSON"):
        read_jsonl(path)


def test_a_missing_file_and_an_empty_one_are_clear(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read the tasks in .*none.jsonl: No such file"):
        read_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="holds no tasks"):
        read_jsonl(write(tmp_path / "empty.jsonl", ""))


def test_each_of_many_broken_rows_is_reported_and_the_rest_is_read(tmp_path):
    kinds = ["{", "[1]", '{"answer": "2"}', '{"question": "1"}', "\\x00", "nul", '"a"', "{}"]
    lines = [kinds[n % len(kinds)] for n in range(10_000)]
    lines[::100] = [json.dumps({"question": f"q{n}", "answer": n}) for n in range(100)]
    path = write(tmp_path / "tasks.jsonl", *lines)
    config = DataConfig(source="jsonl", path=path, broken_rows="skip")
    broken = left_out([config])
    assert [each.split(": ")[0] for each in broken] == [
        f"{path}:{number + 1}" for number in range(10_000) if number % 100
    ]
    assert len(read_jsonl(path, broken_rows="skip")) == 100
    with pytest.raises(ValueError, match=r"tasks\.jsonl:2: not an object"):
        load_source(DataConfig(source="jsonl", path=path))


def test_rows_are_read_again_from_their_place_and_not_kept(tmp_path):
    long = "x" * 40_000  # longer than one read
    rows = [{"question": f"{n} {long}", "answer": n} for n in range(30)]
    path = write(tmp_path / "tasks.jsonl", *map(json.dumps, rows))
    source = load_source(DataConfig(source="jsonl", path=path))
    held = source.keys.nbytes + source.numbers.nbytes  # type: ignore[attr-defined]
    assert held == 16 * len(source)
    assert [source[index]["question"] for index in range(len(source))] == [
        row["question"] for row in rows if not is_held_out(row["question"])
    ]


def test_the_last_line_needs_no_end(tmp_path):
    path = tmp_path / "tasks.jsonl"
    path.write_text('{"question": "1", "answer": 1}\n\n{"question": "2", "answer": "\u03c0"}')
    assert [row["answer"] for row in read_jsonl(path)] == ["1", "\u03c0"]


def test_a_file_that_has_changed_is_read_anew(tmp_path):
    path = write(tmp_path / "tasks.jsonl", '{"question": "1", "answer": 1}')
    assert len(read_jsonl(path)) == 1
    write(path, '{"question": "1", "answer": 1}', '{"question": "2", "answer": 2}')
    assert len(read_jsonl(path)) == 2


def test_questions_are_filtered_by_their_length(tmp_path):
    rows = [{"question": "q" * n, "answer": n} for n in range(1, 41)]
    path = write(tmp_path / "tasks.jsonl", *map(json.dumps, rows))
    settings: dict[str, Any] = {"min_question_chars": 5, "max_question_chars": 9}
    assert [row["answer"] for row in read_jsonl(path, **settings)] == ["5", "6", "7", "8", "9"]
    config = DataConfig(source="jsonl", path=path, **settings)
    assert left_out([config]) == [f"{path}: 35 rows left out by the length of their question"]


def test_columns_can_have_other_names_and_lie_in_objects(tmp_path):
    path = write(tmp_path / "t.jsonl", '{"problem": "1+1?", "solution": {"final": 2}}')
    (row,) = read_jsonl(path, question_column="problem", answer_column="solution.final")
    assert (row["question"], row["answer"]) == ("1+1?", "2")
    with pytest.raises(ValueError, match=r"t\.jsonl:1: 'solution\.x' must be a text or a number"):
        read_jsonl(path, question_column="problem", answer_column="solution.x")


def test_hidden_tests_are_read_when_the_data_is_opened(tmp_path):
    row = {"question": "q", "answer": "a", "entry_point": "f", "tests": ["assert f(1) == open(2)"]}
    path = write(tmp_path / "t.jsonl", json.dumps(row))
    with pytest.raises(ValueError, match=r"t\.jsonl:1: test 0 is not of the form"):
        read_jsonl(path)


@pytest.mark.parametrize("written", ["0.00005", "1e22", "5e-05", "1.10", "7", "-0.5"])
def test_a_number_as_answer_keeps_its_text(tmp_path, written):
    path = write(tmp_path / "t.jsonl", f'{{"question": "q", "answer": {written}, "x": 0.5}}')
    (row,) = read_jsonl(path)
    assert (row["answer"], row["x"]) == (written, 0.5)


# --------------------------------------------------------------------- parquet, the hub


def verl_row(number, **changes):
    return {
        "data_source": "made/up",
        "prompt": [{"role": "user", "content": f"What is {number}+1?"}],
        "reward_model": {"style": "rule", "ground_truth": str(number + 1)},
        "extra_info": {"index": number, "split": "train"},
    } | changes


def write_parquet(path, rows):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7)
    return path


def test_parquet_in_the_form_of_verl(tmp_path):
    path = write_parquet(tmp_path / "train.parquet", [verl_row(n) for n in range(40)])
    config = DataConfig(source="parquet", path=path)
    splits = open_rows(config).splits
    assert sum(map(len, splits.values())) == 40
    for tasks in splits.values():
        for index, number in enumerate(tasks.numbers):
            row = tasks[index]
            assert (row["question"], row["answer"]) == (f"What is {number}+1?", str(number + 1))
            assert (row["task_id"], row["data_source"]) == (f"train.parquet:{number}", "made/up")
            assert row["extra_info"]["index"] == number


def test_a_system_message_stands_before_the_question_and_other_roles_are_broken(tmp_path):
    system, user = ({"role": role, "content": role} for role in ("system", "user"))
    rows = [verl_row(0, prompt=[system, user]), verl_row(1, prompt=[user, system])]
    path = write_parquet(tmp_path / "t.parquet", rows)
    config = DataConfig(source="parquet", path=path, broken_rows="skip")
    (row,) = [task for tasks in open_rows(config).splits.values() for task in tasks]
    assert row["question"] == "system\n\nuser"
    (sentence,) = left_out([config])
    assert sentence.startswith(f"{path}:1: 'prompt' must be a text, or a user message")


@pytest.mark.parametrize("column", ["prompt", "question"])
@pytest.mark.parametrize("pack", [list, json.dumps, lambda each: json.dumps(each, indent=2)])
def test_messages_may_be_objects_or_their_json_text(tmp_path, column, pack):
    row = {column: pack([{"role": "user", "content": "1+1?"}]), "answer": "2"}
    if column == "prompt":
        row = {"prompt": row["prompt"], "reward_model": {"ground_truth": "2"}}
    (task,) = read_jsonl(write(tmp_path / "t.jsonl", json.dumps(row)))
    assert (task["question"], task["answer"]) == ("1+1?", "2")


def test_of_two_forms_in_a_row_the_complete_one_counts(tmp_path):
    messages = [{"role": "user", "content": "1+1?"}]
    verl = {"prompt": messages, "reward_model": {"ground_truth": "2"}, "question": "short"}
    path = write(tmp_path / "t.jsonl", json.dumps(verl), json.dumps({**verl, "answer": "3"}))
    found = [(task["question"], task["answer"]) for task in read_jsonl(path)]
    assert found == [("1+1?", "2"), ("short", "3")]


def test_a_text_that_only_looks_like_messages_is_a_question(tmp_path):
    lines = ['[{"role": "user"', "[1, 2] has what sum?", '[{"a": 1}]']
    rows = [json.dumps({"question": line, "answer": "2"}) for line in lines]
    found = [task["question"] for task in read_jsonl(write(tmp_path / "t.jsonl", *rows))]
    assert found == lines


def test_a_file_that_is_no_parquet_is_refused(tmp_path):
    pytest.importorskip("pyarrow")
    path = write(tmp_path / "t.parquet", "no")
    with pytest.raises(ValueError, match=r"cannot read the parquet file .*t\.parquet"):
        load_source(DataConfig(source="parquet", path=path))


def test_a_data_set_of_the_hub_is_loaded_from_a_folder(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    rows = [json.dumps({"question": f"q{n}", "answer": str(n)}) for n in range(30)]
    write(tmp_path / "set" / "train.jsonl", *rows)
    config = DataConfig(source="hub", dataset=str(tmp_path / "set"))
    splits = open_rows(config).splits
    assert {task["question"] for tasks in splits.values() for task in tasks} == {
        f"q{n}" for n in range(30)
    }
    with pytest.raises(ValueError, match=r"cannot load the data set .*nowhere"):
        load_source(DataConfig(source="hub", dataset=str(tmp_path / "nowhere")))


# ---------------------------------------------------------------------- mixtures, own draws


def test_a_mixture_has_its_weights_in_every_block_and_all_tasks_of_each_source(tmp_path):
    rows = [json.dumps({"question": f"q{n}", "answer": n}) for n in range(300)]
    path = write(tmp_path / "tasks.jsonl", *rows)
    mix = [{"weight": 3.0}, {"source": "jsonl", "path": path, "weight": 1.0}]
    order = load_order(DataConfig.model_validate({"mix": mix}), seed=5)
    tasks = [order[position].task_id for position in range(2048)]
    for block in (tasks[:1024], tasks[1024:]):
        assert sum(each.startswith("arithmetic/") for each in block) == 768
    of_file = [each for each in tasks if each.startswith("tasks.jsonl:")]
    train = sum(not is_held_out(f"q{n}") for n in range(300))
    assert len(set(of_file[:train])) == train


@pytest.mark.parametrize("position", [0, 5, 1023, 1024, 3000])
def test_a_mixture_resumes_at_a_position(position):
    config = DataConfig.model_validate({"mix": [{"weight": 2.0}, {"source": "code"}]})
    whole, resumed = load_order(config, 1), load_order(config, 1)
    tasks = ids(whole, 0, position + 5)
    assert ids(resumed, position, position + 5) == tasks[position:]


def test_the_held_out_tasks_of_a_mixture_are_divided_by_weight():
    config = DataConfig.model_validate({"mix": [{"weight": 3.0}, {"source": "code"}]})
    kinds = [task.task_id.split("/")[0] for task in load_held_out(config, 8)]
    assert kinds == ["arithmetic"] * 6 + ["code"] * 2


def test_an_environment_draws_by_seeds_that_the_splits_do_not_share():
    config = DataConfig(source="env", num_tasks=50, seed=3)
    train = [Task.from_row(load_source(config)[index]) for index in range(50)]
    held_out = load_held_out(config, 50)
    assert len({task.seed for task in train + held_out}) == 100
    assert train[0].to_options() == {"split": "train"}
    assert held_out[0].to_options() == {"split": "held_out"}
