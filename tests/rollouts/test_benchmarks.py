"""Named benchmarks, read from small local files with the columns of their cards."""

import json

import pytest

from tir_alp.config import EvalConfig, EvalSource
from tir_alp.rollouts.benchmarks import BENCHMARKS, environment_of, source_of
from tir_alp.rollouts.data import load_eval_sets

MATH = {"problem": "What is 6*7?", "answer": "42", "solution": "..."}
HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'def double(x):\n    """Return twice x."""\n',
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(0) == 0\n",
    "entry_point": "double",
}
MBPP = {
    "task_id": 7,
    "prompt": "Write a function to double a number.",
    "code": "def helper(x):\n    return x\ndef double(x):\n    return helper(x) * 2",
    "test_imports": [],
    "test_list": ["assert double(2) == 4", "assert double(-1) == -2"],
}
ROWS = {
    "gsm8k": {"question": "What is 6*7?", "answer": "It is 6*7 = <<6*7=42>>42.\n#### 42"},
    "math500": MATH | {"subject": "Algebra", "level": 1, "unique_id": "u"},
    "aime24": MATH | {"id": 60, "year": "2024"},
    "aime25": {"problem": "What is 6*7?", "answer": "42", "id": "0"},
    "amc23": {"id": "0", "question": "What is 6*7?", "answer": "42"},
    "minerva": {"question": "What is 6*7?", "answer": "42"},
    "olympiadbench": {"question": "What is 6*7?", "final_answer": ["42"], "id": 1},
    "humaneval": HUMANEVAL,
    "mbpp": MBPP,
}


def test_there_is_a_row_for_each_benchmark():
    assert ROWS.keys() == BENCHMARKS.keys()


@pytest.mark.parametrize("name", ROWS)
def test_a_copy_in_a_file_is_read_with_the_columns_of_the_benchmark(tmp_path, name):
    file = tmp_path / "copy.jsonl"
    file.write_text(json.dumps(ROWS[name]) + "\n")
    settings = EvalSource(**source_of(f"{name}={file}"))
    (found,) = load_eval_sets(None, EvalConfig(data=(settings,)))
    (task,) = found.tasks
    assert found.name == name
    if name in ("humaneval", "mbpp"):
        assert task.metadata["entry_point"] == task.answer == "double"
        assert "double" in task.question and task.metadata["tests"]
    else:
        assert (task.question, task.answer) == ("What is 6*7?", "42")


@pytest.mark.sandbox
@pytest.mark.parametrize(
    ("name", "solution"),
    [
        ("humaneval", "def double(x):\n    return x + x"),
        ("mbpp", "def double(x):\n    return x + x"),
    ],
)
def test_a_coding_task_is_graded_by_its_tests(tmp_path, name, solution):
    import gymnasium

    file = tmp_path / "copy.jsonl"
    file.write_text(json.dumps(ROWS[name]) + "\n")
    settings = EvalSource(**source_of(f"{name}={file}"))
    (task,) = load_eval_sets(None, EvalConfig(data=(settings,)))[0].tasks
    env = gymnasium.make(environment_of([name]) or "")
    try:
        for code, reward in ((solution, 1.0), (solution.replace("x + x", "x"), 0.0)):
            env.reset(options=task.to_options())
            assert env.step(f"```solution\n{code}\n```")[1] == reward
    finally:
        env.close()


def test_words_that_name_data(tmp_path):
    assert source_of("gsm8k")["source"] == "hub"
    assert source_of("arithmetic") == {"name": "arithmetic", "source": "arithmetic"}
    assert source_of("reasoning_gym:gcd")["dataset"] == "gcd"
    assert source_of("x.parquet") == {"source": "parquet", "path": "x.parquet"}
    with pytest.raises(ValueError, match="--data nothing: there is no such benchmark, source or"):
        source_of("nothing")
    with pytest.raises(ValueError, match="not played in the same environment"):
        environment_of(["gsm8k", "mbpp"])
    assert environment_of(["arithmetic"]) is None


def test_a_set_is_limited_and_named_after_its_file(tmp_path):
    file = tmp_path / "my tasks.jsonl"
    rows = [{"question": f"q{n}", "answer": str(n)} for n in range(5)]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    settings = EvalSource(source="jsonl", path=file, limit=2)
    (found,) = load_eval_sets(None, EvalConfig(data=(settings,)))
    assert found.name == "my-tasks" and [each.question for each in found.tasks] == ["q0", "q1"]
