"""Rows of LiveCodeBench and APPS as they are published, packed tests included."""

import base64
import json
import os
import pickle
import zlib

import pytest

from tests.envs.solutions import play, python_code
from tir_alp.config import DataConfig
from tir_alp.rollouts import packed_tests
from tir_alp.rollouts.data import left_out, load_source
from tir_alp.rollouts.packed_tests import read_packed, unpickled
from tir_alp.tools.code_forms import FunctionTests, ProgramTests, read_tests

PUBLIC = [{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]
PRIVATE = [{"input": f"{n} 1\n", "output": f"{n + 1}\n", "testtype": "stdin"} for n in range(40)]
CALLS = [{"input": "[1, 2]\n3", "output": "[4, 5]", "testtype": "functional"}]
STARTER = "class Solution:\n    def addAll(self, xs: List[int], n: int) -> List[int]:\n        "


def packed(value):
    """As LiveCodeBench packs a column."""
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


def row(private, **changes):
    return {
        "question_title": "A. Sum",
        "question_content": "Read two whole numbers, and print their sum.",
        "platform": "codeforces",
        "question_id": "1873_A",
        "contest_id": "1873",
        "contest_date": "2024-01-01T00:00:00",
        "starter_code": "",
        "difficulty": "easy",
        "public_test_cases": json.dumps(PUBLIC),
        "private_test_cases": private,
        "metadata": "{}",
        **changes,
    }


FUNCTION = row(
    packed(json.dumps(CALLS)),
    question_content="Add n to each number.",
    public_test_cases=json.dumps(CALLS),
    starter_code=STARTER,
    metadata='{"func_name": "addAll"}',
)


def source(path, rows, **settings):
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return DataConfig(source="jsonl", path=path, **settings)


def load(path, *rows, **settings):
    tasks = load_source(source(path, rows, **settings), whole=True)
    return [tasks[index] for index in range(len(tasks))]


@pytest.mark.parametrize(
    "private",
    [
        packed(json.dumps(PRIVATE)),
        packed(PRIVATE),
        *(
            base64.b64encode(zlib.compress(pickle.dumps(json.dumps(PRIVATE), each))).decode()
            for each in range(pickle.HIGHEST_PROTOCOL + 1)
        ),
        json.dumps(PRIVATE),
        PRIVATE,
    ],
)
def test_public_and_private_tests_are_read_whether_packed_or_not(tmp_path, private):
    (task,) = load(tmp_path / "t.jsonl", row(private))
    assert (task["task_id"], task["answer"]) == ("1873_A", "1873_A")
    assert task["question"] == "Read two whole numbers, and print their sum."
    assert "private_test_cases" not in task and "public_test_cases" not in task
    tests = read_tests(task)
    assert isinstance(tests, ProgramTests) and len(tests.cases) == 41
    assert (tests.cases[-1].stdin, tests.cases[-1].expected) == ("39 1\n", "40\n")


def test_a_method_is_tested_by_its_name_in_the_metadata(tmp_path):
    (task,) = load(tmp_path / "t.jsonl", FUNCTION)
    tests = read_tests(task)
    assert isinstance(tests, FunctionTests) and tests.entry_point == "addAll"
    assert [case.args for case in tests.cases] == [([1, 2], 3)] * 2
    assert task["question"].endswith(f"Begin with this code:\n\n{STARTER.rstrip()}")


@pytest.mark.sandbox
def test_solutions_of_such_rows_are_graded(tmp_path):
    tasks = load(tmp_path / "t.jsonl", row(packed(json.dumps(PRIVATE))), FUNCTION)
    program = "a, b = map(int, input().split())\nprint(a + b)"
    method = "class Solution:\n    def addAll(self, xs, n): return [x + n for x in xs]"
    codes = (program, method, "print(3)", "def addAll(xs, n): return []")
    with python_code() as env:
        rewards = [play(env, code, task)[0] for task, code in zip(tasks * 2, codes, strict=True)]
    assert rewards == [1.0, 1.0, 0.0, 0.0]


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def bomb():
    return base64.b64encode(zlib.compress(b"\0" * (packed_tests.MAX_BYTES + 1), 9)).decode()


def nested(levels):
    value = []
    for _ in range(levels):
        value = [value] * 10
    return value


@pytest.mark.parametrize(
    ("private", "reason"),
    [
        (bomb(), "more than 256 MB when it is decompressed"),
        (packed(json.dumps(PRIVATE))[:-40], "cut off|neither JSON nor base64"),
        ("not packed at all", "neither JSON nor base64 of zlib"),
        (base64.b64encode(b"no zlib").decode(), "neither JSON nor base64 of zlib"),
        (base64.b64encode(zlib.compress(b"no pickle")).decode(), "pickle"),
        (packed({1, 2}), "more than texts, lists, dicts and numbers"),
        (packed(nested(9)), "occurs twice"),
        (packed("[1, 2"), "is not JSON"),
        (packed("[" * 100_000), "is not JSON"),
        (packed(7), "must be a list of tests"),
        (packed(json.dumps([{"input": "1"}])), "must have 'input' and 'output'"),
        ("[1, 2", "is not JSON"),
        (42, "must be a list of tests"),
    ],
)
def test_a_row_whose_tests_cannot_be_read_is_named_with_the_reason(tmp_path, private, reason):
    rows = [row(packed(json.dumps(PRIVATE))), row(private)]
    with pytest.raises(ValueError, match=rf"t\.jsonl:2: .*({reason})"):
        load(tmp_path / "t.jsonl", *rows)
    assert len(load(tmp_path / "t.jsonl", *rows, broken_rows="skip")) == 1
    (sentence,) = left_out([source(tmp_path / "t.jsonl", rows, broken_rows="skip")])
    assert "t.jsonl:2" in sentence


def test_a_huge_index_takes_no_memory():
    assert unpickled(b"\x80\x04]r\xff\xff\xff\x7f.") == []  # pickle.loads would take 32 GB


def test_a_pickle_is_not_executed(tmp_path):
    target = tmp_path / "made"
    with pytest.raises(ValueError, match="it is not executed"):
        load(tmp_path / "t.jsonl", row(packed(Evil(target))))
    assert not target.exists()
    pickle.loads(pickle.dumps(Evil(target)))
    assert target.exists()  # so the pickle would have done it


def test_a_row_without_any_test_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"t\.jsonl:1: there are no tests"):
        load(tmp_path / "t.jsonl", row("", public_test_cases="[]"))
    assert read_packed(None) == read_packed(" ") == []


APPS = {
    "problem_id": 1,
    "question": "Read two whole numbers, and print their sum.",
    "solutions": json.dumps(["print(sum(map(int, input().split())))"]),
    "input_output": json.dumps({"inputs": ["1 2\n"], "outputs": ["3\n"]}),
    "difficulty": "introductory",
    "url": "https://example.org",
    "starter_code": "",
}


def test_rows_of_apps_are_read_as_they_are_published(tmp_path):
    called = {"fn_name": "add", "inputs": [[1, 2]], "outputs": [3]}
    rows = [
        APPS,
        APPS
        | {"solutions": "", "input_output": json.dumps(called), "starter_code": "def add(a, b):"},
    ]
    program, function = load(tmp_path / "t.jsonl", *rows)
    assert program["answer"] == "print(sum(map(int, input().split())))"
    assert isinstance(read_tests(program), ProgramTests)
    tests = read_tests(function)
    assert (
        isinstance(tests, FunctionTests) and (tests.entry_point, function["answer"]) == ("add",) * 2
    )
    assert function["question"].endswith("Begin with this code:\n\ndef add(a, b):")


@pytest.mark.parametrize(
    ("column", "reason"),
    [
        ("", "has no inputs"),
        ("{}", "has no inputs"),
        ("{", "is not JSON"),
        ("[1]", "must be an object"),
    ],
)
def test_a_row_of_apps_without_tests_is_refused(tmp_path, column, reason):
    with pytest.raises(ValueError, match=rf"t\.jsonl:1: 'input_output' {reason}"):
        load(tmp_path / "t.jsonl", APPS | {"input_output": column})
