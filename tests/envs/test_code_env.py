"""Hidden tests stay hidden, whatever a function tries."""

import pytest

from tests.envs.solutions import play, python_code
from tir_alp.envs.code_tasks import CodeTasks
from tir_alp.tools.code_tests import Case, read_cases
from tir_alp.tools.held_out import is_held_out

pytestmark = pytest.mark.sandbox

TASK = {
    "question": "Write f(xs), the sum.",
    "entry_point": "f",
    "tests": [{"args": [[1, 2, 39]], "expected": 42}, {"args": [[]], "expected": 0}],
    "answer": "def f(xs):\n    return sum(xs)\n",
}


@pytest.fixture(scope="module")
def env():
    with python_code() as made:
        yield made


def submit(env, code, task=TASK):
    return play(env, code, task)


def test_a_right_function_scores(env):
    assert submit(env, "def f(xs):\n    return sum(xs)") == (1.0, "")


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("def f(xs):\n    return 42", "test 1 returned something else"),
        ("def f(xs)", "the definition failed: SyntaxError: expected ':'"),
        ("def g(xs):\n    return sum(xs)", "test 0 failed: NameError: name 'f' is not defined"),
        ("def f(xs):\n    return str(sum(xs))", "test 0 returned something else"),
        ("def f(xs):\n    raise SystemExit(0)", "test 0 failed"),
        ("import os\nos._exit(0)", "the definition failed"),
        ("def f(xs):\n    while True: pass", "test 0 failed"),
        ("def f(xs):\n    print(42)", "test 0 returned something else"),
    ],
)
def test_a_wrong_function_scores_nothing_and_the_reason_is_reported(env, code, error):
    reward, message = submit(env, code)
    assert reward == 0.0 and message.startswith(error)


@pytest.mark.parametrize(
    "code",
    [
        "class E:\n    def __eq__(self, other): return True\n    def __hash__(self): return 0\n"
        "def f(xs): return E()",
        "import builtins\nbuiltins.sum = lambda xs: 42\nbuiltins.repr = lambda x: '42'\n"
        "def f(xs): return None",
        "import sys\nsys.displayhook = lambda x: print(42)\ndef f(xs): return 0",
        "class Any(int):\n    def __repr__(self): return '4'+'2'\ndef f(xs): return Any(0)",
    ],
    ids=["equal to all", "patched builtins", "patched display", "a number of many faces"],
)
def test_a_function_cannot_talk_its_way_through(env, code):
    assert submit(env, code)[0] == 0.0


def test_what_is_expected_never_enters_the_sandbox(env):
    secret = 918_273_645
    task = TASK | {"tests": [{"args": [1], "expected": secret}]}
    search = f"""
import gc, sys
def f(x):
    seen = []
    frame = sys._getframe()
    while frame:
        seen.append(repr(frame.f_locals))
        seen.append(repr(frame.f_code.co_consts))
        frame = frame.f_back
    for each in gc.get_objects():
        try:
            seen.append(repr(each))
        except BaseException:
            pass
    text = "".join(seen)
    secret = {secret - 1} + x
    return secret if str(secret) in text else 0
"""
    assert submit(env, search, task) == (0.0, "test 0 returned something else")


def test_the_interpreter_of_the_tool_is_not_the_one_of_the_tests(env):
    env.reset(options={"task": TASK})
    assert env.step("```python\nhelper = sum\n```")[4]["outcome"] == "ok"
    _, reward, *_, info = env.step("```solution\ndef f(xs):\n    return helper(xs)\n```")
    assert reward == 0.0 and "NameError" in info["error"]


def test_the_last_complete_solution_counts(env):
    env.reset(options={"task": TASK})
    good = f"```solution\n{TASK['answer']}```"
    assert env.step(f"```solution\nnonsense(\n```\nno:\n{good}\n```solution\nunfinished")[1] == 1.0
    env.reset(options={"task": TASK})
    assert env.step("```solution\ndef f(xs): return sum(xs)")[4]["void"] is True


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (None, "None"),
        (0.1 + 0.2, "0.3"),
        ((1, [2.0, {"a": {1, 2}}]), "(1, [2.0, {'a': {2, 1}}])"),
        ("naïve 'π'", "\"naïve 'π'\""),
        (True, "True"),
    ],
)
def test_values_of_every_literal_kind_are_compared(env, value, written):
    task = TASK | {"tests": [{"args": [], "expected": value}]}
    assert submit(env, f"def f():\n    return {written}", task)[0] == 1.0
    assert submit(env, "def f():\n    return 'else'", task)[0] == 0.0


def test_a_list_is_not_a_tuple(env):
    task = TASK | {"tests": [{"args": [], "expected": [1]}]}
    assert submit(env, "def f():\n    return (1,)", task)[0] == 0.0


@pytest.mark.parametrize(
    ("value", "code", "reward"),
    [
        (12, "return 6 * 4 / 2", 1.0),
        ([1], "return [True]", 1.0),
        ({"a": 2, "b": 1}, "import collections\n    return collections.Counter('aab')", 1.0),
        (
            {"a": 2},
            "import collections\n    d = collections.defaultdict(int)\n"
            "    d['a'] += 2\n    return d",
            1.0,
        ),
        ((1, 2), "import collections\n    return collections.namedtuple('P', 'x y')(1, 2)", 1.0),
        (0.5, "from fractions import Fraction\n    return Fraction(1, 2)", 1.0),
        (3, "from decimal import Decimal\n    return Decimal('3.0')", 1.0),
        ({1, 2}, "return frozenset([1, 2])", 1.0),
        (12, "return '12'", 0.0),
        ([1, 2], "return {1, 2}", 0.0),
        (None, "return 0", 0.0),
        (1, "class E(int):\n        __eq__ = lambda *_: True\n    return E(3)", 0.0),
        ([1], "class L(list):\n        __eq__ = lambda *_: True\n    return L()", 0.0),
    ],
)
def test_values_are_compared_as_python_compares_them(env, value, code, reward):
    task = TASK | {"tests": [{"args": [], "expected": value}]}
    assert submit(env, f"def f():\n    {code}", task)[0] == reward


@pytest.mark.parametrize(
    ("assertion", "passes", "fails"),
    [
        ("assert set(f(1)) == set([1, 2])", "[2, 1, 2]", "[1]"),
        ("assert f(1) is None", "None", "0"),
        ("assert not f(1)", "False", "True"),
        ("assert f(1)", "[0]", "[]"),
        ("assert abs(f(1) - 2.5) < 1e-6", "2.5000000001", "2.6"),
        ("assert math.isclose(f(1), 2.5, rel_tol=0.001)", "2.5001", "2.6"),
        ("assert f(1) != 3", "4", "3"),
        ("assert f(1) in [3, 4]", "4", "5"),
        ("assert 3 == f(1)", "3", "4"),
        ("assert f(1) == True", "True", "False"),
        ("assert sorted(f(1)) == [1, 2]", "[2, 1]", "[2]"),
        ("assert f([0] * 3, set([1])) == 3, 'a message'", "3", "4"),
        ("assert tuple(f(1)) == (1, 2)", "[1, 2]", "[2, 1]"),
    ],
)
def test_conditions_of_assertions_are_decided_on_the_host(assertion, passes, fails):
    (case,) = read_cases([assertion], "f")
    assert case.is_passed(None if passes == "None" else passes)
    assert not case.is_passed(fails)
    assert not case.is_passed("<object at 0x7f>") and not case.is_passed("__import__('os')")


def test_the_assertions_of_a_check_function_are_read():
    text = "META = {}\n\ndef check(candidate):\n    assert candidate(1) == 2\n    assert True\n"
    assert read_cases(text, "f") == [Case((1,), 2)]
    with pytest.raises(ValueError, match="holds more than assertions: with"):
        read_cases("def check(c):\n    with x:\n        assert c(x)", "f")


def test_assertions_are_read_as_calls_and_what_they_expect():
    assert read_cases(["assert f(1, b=[2]) == {'x': -3}"], "f") == [
        Case((1,), {"x": -3}, {"b": [2]})
    ]


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        ([], "'tests' must be a list that is not empty"),
        ("assert f() == 1", "'tests' must be a list"),
        (["assert g() == 1"], r"test 0 is not of the form `assert f\(...\)"),
        (["assert f() == open('x')"], "test 0 is not of the form"),
        (["assert f() == f(1)"], "test 0 is not of the form"),
        (["assert open(f())"], "test 0 is not of the form"),
        (["assert f().real == 1"], "test 0 is not of the form"),
        ([{"args": [1]}], "test 0 must have 'args' and 'expected'"),
        ([{"args": [], "expected": float("nan")}], "test 0 holds more than Python literals"),
    ],
)
def test_malformed_tests_are_refused_when_the_episode_begins(env, tests, message):
    with pytest.raises(ValueError, match=message):
        env.reset(options={"task": TASK | {"tests": tests}})


def test_generated_tasks_follow_from_their_index_and_keep_to_their_split():
    assert CodeTasks(0, 9)[4] == CodeTasks(0, 9)[4] != CodeTasks(0, 9)[5]
    train = [CodeTasks(0, 60, "train")[index]["question"] for index in range(60)]
    assert not any(map(is_held_out, train))
    assert is_held_out(CodeTasks(0, 9, "held_out")[3]["question"])
