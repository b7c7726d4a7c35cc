"""Programs that read stdin and write stdout, in the forms of APPS and LiveCodeBench."""

import json

import pytest

from tests.envs.solutions import play, python_code
from tir_alp.config import DataConfig
from tir_alp.rollouts.data import left_out
from tir_alp.tools.code_forms import FunctionTests, ProgramCase, ProgramTests, has_tests, read_tests
from tir_alp.tools.code_tests import Case

ADD = "a, b = map(int, input().split())\nprint(a + b)\n"
TASK = {
    "question": "Read two whole numbers, and print their sum.",
    "tests": {"inputs": ["1 2\n", "40 2\n"], "outputs": ["3\n", "42\n"]},
    "answer": ADD,
}


@pytest.fixture(scope="module")
def env():
    with python_code() as made:
        yield made


def submit(env, code, **task):
    return play(env, code, TASK | task)


@pytest.mark.sandbox
@pytest.mark.parametrize(
    "code",
    [
        ADD,
        "import sys\nprint(sum(map(int, sys.stdin.read().split())))",
        "import os\nprint(eval(os.read(0, 99).decode().replace(' ', '+')), end='')",
        "def main():\n    print(sum(map(int, open(0).read().split())), '  ')\n"
        "if __name__ == '__main__':\n    main()",
        "import sys\nprint(sum(map(int, input().split())))\nsys.exit(0)",
    ],
)
def test_a_program_that_prints_what_is_expected_scores(env, code):
    assert submit(env, code) == (1.0, "")


@pytest.mark.sandbox
@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("print(3)", "test 1 printed something else"),
        ("input()\nprint('a + b =', 3)", "test 0 printed something else"),
        ("", "test 0 printed something else"),
        (ADD + "raise ValueError('late')", "test 0 failed: ValueError: late"),
        (ADD + "import sys\nsys.exit(3)", "test 0 failed"),
        ("while True: pass", "test 0 failed"),
        ("print('3\\n' * 10**7)", "test 0"),
        ("import sys\nsys.stderr.write('3\\n')", "test 0 printed something else"),
        ("a = int(input())", "test 0 failed: ValueError"),
    ],
)
def test_a_program_that_does_not_scores_nothing(env, code, error):
    reward, message = submit(env, code)
    assert reward == 0.0 and message.startswith(error)


@pytest.mark.sandbox
def test_neither_the_outputs_nor_other_inputs_are_in_reach_of_a_program(env):
    search = """
import gc, glob, os, sys
input()
seen = [repr(each) for each in gc.get_objects() if type(each) in (str, bytes, dict, list)]
frame = sys._getframe()
while frame:
    seen += [repr(frame.f_locals), repr(frame.f_globals)]
    frame = frame.f_back
for folder, _, names in os.walk("."):
    for name in names:
        seen.append(open(os.path.join(folder, name), errors="replace").read())
secret = str(918273 * 1000 + 645)
other = str(555 * 1000000 + 123456)
print(secret if any(secret in each or other in each for each in seen) else 0)
"""
    tests = {"inputs": ["1\n", "555123456\n"], "outputs": ["918273645\n", "918273645\n"]}
    assert submit(env, search, tests=tests) == (0.0, "test 0 printed something else")


@pytest.mark.sandbox
def test_a_test_leaves_nothing_for_the_next_one(env):
    code = "import os\nprint(int(os.path.exists('mark')))\nopen('mark', 'w').close()\n"
    tests = {"inputs": ["", ""], "outputs": ["0", "0"]}
    assert submit(env, code, tests=tests) == (1.0, "")


@pytest.mark.sandbox
def test_functions_and_methods_are_called_in_the_form_of_apps_and_livecodebench(env):
    apps = {"fn_name": "f", "inputs": [[[1, 2]], [[]]], "outputs": [[3], 0]}
    lcb = [{"input": "[1, 2]\n", "output": "3", "testtype": "functional"}]
    pair = [{"input": "1\ntrue", "output": '[1, true, null, "a"]', "testtype": "functional"}]
    for code in (
        "def f(xs):\n    return sum(xs)",
        "class Solution:\n    def f(self, xs):\n        return sum(xs)",
    ):
        assert submit(env, code, tests=apps) == (1.0, "")
        assert submit(env, code, tests=lcb, entry_point="f") == (1.0, "")
    code = "def f(x, y):\n    return x, y, None, 'a'"
    assert submit(env, code, tests=pair, entry_point="f") == (1.0, "")
    assert submit(env, "def f(xs):\n    return 4", tests=apps)[0] == 0.0


@pytest.mark.sandbox
@pytest.mark.parametrize(
    "code",
    [
        "def f(xs):\n    return sum(xs)\nif __name__ == '__main__':\n    print(f([int(input())]))",
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass P:\n    x: int\ndef f(xs):\n    return P(sum(xs)).x",
    ],
)
def test_a_definition_is_a_module_and_no_main_program(env, code):
    tests = [{"args": [[40, 2]], "expected": 42}]
    assert submit(env, code, tests=tests, entry_point="f") == (1.0, "")


@pytest.mark.sandbox
def test_the_example_turns_of_a_program_are_graded_as_they_should(env):
    for action, reward in (
        (env.unwrapped.gold_action(TASK), 1.0),
        (env.unwrapped.wrong_action(TASK), 0.0),
    ):
        env.reset(options={"task": TASK})
        assert env.step(action)[1] == reward


@pytest.mark.parametrize(
    ("found", "expected", "is_passed"),
    [
        ("1 2\n3\n", "1 2\n3", True),
        ("1 2  \n3\n\n\n", "1 2\n3\n", True),
        ("1  2\r\n3", "1 2\n3", True),
        ("1\n2\n3", "1 2\n3", False),
        ("1 2\n\n3", "1 2\n3", False),
        ("1 2 3", "1 2\n3", False),
        ("YES", "Yes", False),
        ("1.0", "1", False),
        ("", "", True),
        ("", "0", False),
    ],
)
def test_outputs_are_compared_by_tokens_and_lines(found, expected, is_passed):
    assert ProgramCase("", expected).is_passed(found) is is_passed


@pytest.mark.parametrize(
    ("found", "is_passed"),
    [("0.3333", True), ("0.33333333", True), ("0.3345", False), ("x", False), ("nan", False)],
)
def test_numbers_have_a_tolerance_only_where_the_task_says_so(found, is_passed):
    assert ProgramCase("", "0.33333", tolerance=1e-3).is_passed(found) is is_passed
    assert not ProgramCase("", "0.33333").is_passed(found)


def test_the_forms_of_public_data_sets_are_read():
    rows = [{"input": "1 2", "output": "3", "testtype": "stdin"}]
    columns = {"inputs": ["1 2"], "outputs": ["3"]}
    lines = {"inputs": [["1", "2"]], "outputs": [["3"]]}
    program = ProgramTests((ProgramCase("1 2", "3"),))
    for tests in (rows, columns, json.dumps(rows), json.dumps(columns)):
        assert read_tests({"tests": tests}) == program
    assert read_tests({"tests": lines}) == ProgramTests((ProgramCase("1\n2", "3"),))
    assert read_tests({"tests": columns, "tolerance": 1e-6}) == ProgramTests(
        (ProgramCase("1 2", "3", 1e-6),)
    )
    assert read_tests({"tests": ["assert f(1) == 2"], "entry_point": "f"}) == FunctionTests(
        "f", (Case((1,), 2),)
    )


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"tests": {"inputs": ["1"], "outputs": []}}, "must have a list 'outputs'"),
        ({"tests": {"inputs": ["1"]}}, "must have a list 'outputs'"),
        ({"tests": {"inputs": ["1", "2"], "outputs": ["1"]}}, "has 2 inputs, but 1 outputs"),
        ({"tests": {"inputs": [1], "outputs": ["1"]}}, "test 0 must have texts as input"),
        ({"tests": {"inputs": ["1"], "outputs": ["x" * 10**6]}}, "test 0 expects 1000000"),
        ({"tests": {"fn_name": "f", "inputs": ["1"], "outputs": [1]}}, "a list of arguments"),
        ({"tests": {"fn_name": "f g", "inputs": [[1]], "outputs": [1]}}, "the name of a function"),
        ({"tests": [{"input": "1"}]}, "test 0 must have 'input' and 'output'"),
        ({"tests": [{"input": "1", "output": "1", "testtype": "x"}]}, "of testtype"),
        (
            {"tests": [{"input": "1", "output": "1", "testtype": "functional"}]},
            "the name of a function",
        ),
        (
            {"entry_point": "f", "tests": [{"input": "a", "output": "", "testtype": "functional"}]},
            "one JSON value per line",
        ),
        ({"tests": '{"inputs": ["1"], "outputs": '}, "is no JSON"),
        ({"tests": {"inputs": ["1"], "outputs": ["1"]}, "tolerance": "much"}, "'tolerance' must"),
        ({"tests": {"inputs": ["1"], "outputs": ["1"]}, "tolerance": 2}, "'tolerance' must"),
    ],
)
def test_a_row_that_cannot_be_read_is_named_when_the_data_is_opened(tmp_path, task, message):
    with pytest.raises(ValueError, match=message):
        read_tests(task)
    path = tmp_path / "tasks.jsonl"
    row = {"question": "?", "answer": "none"} | task
    path.write_text(json.dumps(TASK) + "\n")
    path.open("a").write(json.dumps(row) + "\n")
    (sentence,) = left_out([DataConfig(source="jsonl", path=path, broken_rows="skip")])
    assert sentence.startswith(f"{path}:2: ") and message in sentence


def test_a_column_named_tests_of_another_kind_is_left_alone():
    assert not has_tests({"tests": 3})
    assert not has_tests({"tests": "none"})
    assert not has_tests({"tests": ["a", "b"]})
    assert has_tests({"tests": 3, "entry_point": "f"})
