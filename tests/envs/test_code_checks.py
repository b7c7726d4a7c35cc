"""Tests as HumanEval and MBPP write them: read without executing them, and graded as they mean."""

import pytest

from tests.envs.solutions import play, python_code
from tir_alp.tools.code_checks import assertions_of
from tir_alp.tools.code_tests import Case, read_cases


def check(*lines: str) -> str:
    return "METADATA = {}\n\n\ndef check(candidate):\n" + "".join(f"    {each}\n" for each in lines)


@pytest.mark.parametrize(
    ("lines", "assertions"),
    [
        (["assert candidate(1) == 2, 'no'", "assert True"], ["assert f(1) == 2, 'no'"]),
        (["import math", "'words'", "pass", "assert candidate(1)"], ["assert f(1)"]),
        (
            ["for x in range(2, 4):", "    assert candidate(x, x + 1) == str(x)"],
            ["assert f(2, 2 + 1) == str(2)", "assert f(3, 3 + 1) == str(3)"],
        ),
        (
            [
                "xs = list(range(3))",
                "total = sum([x**2 for x in xs if x > 1])",
                "assert candidate(xs) == total",
            ],
            ["assert f([0, 1, 2]) == 4"],
        ),
        (
            [
                "for x in (1, 2):",
                "    y = x * 10",
                "    for z in [y]:",
                "        assert candidate(z) == x",
            ],
            ["assert f(10) == 1", "assert f(20) == 2"],
        ),
    ],
)
def test_a_check_is_unrolled_to_assertions(lines, assertions):
    assert assertions_of(check(*lines), "f") == assertions


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (["x = random.randint(0, 9)", "assert candidate(x)"], "more than assertions: x = random"),
        (["x = candidate(1)", "assert x == 1"], "more than assertions: x = candidate"),
        (["while True:", "    assert candidate(1)"], "more than assertions: while True"),
        (["for x in range(10**9):", "    assert candidate(x)"], "more than assertions: for x"),
        (["for x in range(99999):", "    assert candidate(x)"], "more than 10000 assertions"),
        (["x = 9**9**9", "assert candidate(x)"], "more than assertions: x = 9"),
        (["x = 'a' * 10**9", "assert candidate(x)"], "more than assertions: x = 'a'"),
        (["x = open('f')", "assert candidate(x)"], "more than assertions: x = open"),
    ],
)
def test_a_check_that_would_have_to_be_executed_is_refused(lines, reason):
    with pytest.raises(ValueError, match=r"'tests' (holds|has)") as refusal:
        assertions_of(check(*lines), "f")
    assert reason in str(refusal.value)


@pytest.mark.parametrize(
    ("assertion", "case"),
    [
        ("assert f([1, 0 ** 0]) == 2**10", Case(([1, 1],), 1024)),
        ("assert f(7 // 2, 7 % 4) == 5", Case((3, 3), 5)),
        (
            "assert tuple(f(1)) == tuple(f(1))",
            Case((1,), None, {}, "tuple(_value) == tuple(_value)"),
        ),
        ("assert f(1) == float('inf')", Case((1,), None, {}, "_value == float('inf')")),
        ("assert all(x > 0 for x in f(1))", Case((1,), None, {}, "all((x > 0 for x in _value))")),
        ("assert f(1)[:2] == 'ab'", Case((1,), None, {}, "_value[:2] == 'ab'")),
        ("assert isinstance(f(1), int)", Case((1,), None, {}, "isinstance(_value, int)")),
    ],
)
def test_forms_of_assertions(assertion, case):
    assert read_cases([assertion], "f") == [case]


@pytest.mark.parametrize(
    "assertion",
    [
        "assert f(1) == f(2)",
        "assert f(f(1)) == 1",
        "assert f(1) == 10**5000",
        "assert f(1) == 9**9**9",
        "assert f(1) == sys.getsizeof(1)",
        "assert f(1).__class__ == int",
        "assert all(x for x in f(1) for y in x)",
        "assert f(*xs) == 1",
    ],
)
def test_assertions_that_are_not_understood_are_refused(assertion):
    with pytest.raises(ValueError, match="test 0 is not of the form"):
        read_cases([assertion], "f")


@pytest.fixture(scope="module")
def env():
    with python_code() as made:
        yield made


@pytest.mark.sandbox
@pytest.mark.parametrize(
    ("code", "assertion", "reward"),
    [
        ("return {1: 0, 2: 0}.keys()", "assert f(1) == {1, 2}", 1.0),
        ("return {1: 0}.items()", "assert set(f(1)) == {(1, 0)}", 1.0),
        (
            "import collections\n    return collections.ChainMap({1: 2})",
            "assert f(1) == {1: 2}",
            1.0,
        ),
        ("import types\n    return types.MappingProxyType({1: 2})", "assert f(1) == {1: 2}", 1.0),
        ("return bytearray(b'ab')", "assert f(1) == b'ab'", 1.0),
        ("return range(3)", "assert f(1) == [0, 1, 2]", 0.0),
        ("return range(3)", "assert list(f(1)) == [0, 1, 2]", 1.0),
        ("return (n for n in range(3))", "assert sorted(f(1)) == [0, 1, 2]", 1.0),
        ("return zip([1], [2])", "assert list(f(1)) == [(1, 2)]", 1.0),
        ("import collections\n    return collections.deque([1, 2])", "assert f(1)[0] == 1", 1.0),
        ("import itertools\n    return itertools.count()", "assert set(f(1)) == {1}", 0.0),
        ("import re\n    return re.search('a', 'ab')", "assert f(1)", 1.0),
        ("import re\n    return re.search('c', 'ab')", "assert f(1)", 0.0),
        ("import re\n    return re.search('c', 'ab')", "assert not f(1)", 1.0),
        ("return float('inf')", "assert f(1) == float('inf')", 1.0),
        ("return [float('-inf'), 1]", "assert f(1) == [float('-inf'), 1]", 1.0),
        ("return float('nan')", "assert f(1) == float('inf')", 0.0),
        ("return 'inf'", "assert f(1) == float('inf')", 0.0),
        ("return 5", "assert tuple(f(1)) == tuple(f(1))", 0.0),
    ],
)
def test_values_pass_where_they_would_in_python(env, code, assertion, reward):
    task = {"question": "q", "entry_point": "f", "tests": [assertion], "answer": "a"}
    assert play(env, f"def f(x):\n    {code}", task)[0] == reward
