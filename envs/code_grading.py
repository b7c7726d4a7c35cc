"""Grades a function with hidden tests, on the host, by the values that the function returns.

The sandbox receives the function, and the arguments of one test at a time. The expected values
never enter it, and none of the code that decides runs there: the best that a program can do, even
after taking over its interpreter, is to return the right value.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tir_alp.envs.grading import Grade
from tir_alp.tools.outcome import Outcome
from tir_alp.tools.sandbox import BlockingSandbox, Limits, SandboxError, SandboxRefused

_SPARE_CHARS = 1000  # a value's text may be this much longer than that of the expected value


@dataclass(frozen=True, slots=True)
class Case:
    """One hidden test: the arguments of a call, and the value that it has to return.

    Example: `Case(args=([3, 1, 2],), expected=[1, 2, 3])`.
    """

    args: tuple[Any, ...]
    expected: Any
    kwargs: Mapping[str, Any] = field(default_factory=dict)


def read_cases(tests: Any, entry_point: str) -> list[Case]:
    """Read the tests of a task.

    Args:
        tests: A list of objects with `args`, `expected` and optionally `kwargs`, or of assertions
            of the form `assert f(1, 2) == 3`, as in MBPP.
        entry_point: Name of the function.

    Raises:
        ValueError: A test, which the message names, has neither form, or holds values other than
            Python literals.
    """
    if not isinstance(tests, Sequence) or isinstance(tests, str) or not tests:
        raise ValueError("'tests' must be a list that is not empty")
    if not entry_point.isidentifier():
        raise ValueError(f"'entry_point' must be the name of a function, not {entry_point!r}")
    return [_read_case(test, f"test {number}", entry_point) for number, test in enumerate(tests)]


def grade_function(
    source: str,
    entry_point: str,
    cases: Sequence[Case],
    sandbox: BlockingSandbox,
    limits: Limits,
) -> Grade:
    """Run a function on the arguments of all tests, and compare the values that it returns.

    Args:
        source: Program that defines the function.
        entry_point: Name of the function.
        cases: Hidden tests; the first failure ends the grading.
        sandbox: Sandbox in which the function runs, in a session of its own.
        limits: Limits for running the definition, and for each test.
    """
    try:
        session = sandbox.session()
    except SandboxRefused:
        raise
    except SandboxError as error:
        return Grade(correct=None, outcome=Outcome.GRADER_ERROR, error=str(error))
    try:
        calls = [f"{entry_point}(*{case.args!r}, **{dict(case.kwargs)!r})" for case in cases]
        for number, call in enumerate([f"{source}\nNone", *calls], start=-1):
            case = cases[number] if number >= 0 else None
            room = len(repr(case.expected)) + _SPARE_CHARS if case else _SPARE_CHARS
            result = session.run(call, limits.model_copy(update={"output_chars": room}))
            if result.outcome.is_infrastructure:
                return Grade(correct=None, outcome=Outcome.GRADER_ERROR, error=result.stderr)
            if result.outcome is not Outcome.OK:
                what = "the definition" if case is None else f"test {number}"
                lines = result.stderr.strip().splitlines() or [result.outcome.value]
                return Grade(correct=False, error=f"{what} failed: {lines[-1]}")
            if case is not None and not _returned(result.value, case.expected):
                return Grade(correct=False, error=f"test {number} returned something else")
    finally:
        session.close()
    return Grade(correct=True)


def _returned(written: str | None, expected: Any) -> bool:
    if written is None:
        return expected is None
    try:
        return _same(ast.literal_eval(written), expected)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return False


def _same(found: Any, expected: Any) -> bool:
    if isinstance(expected, float) and isinstance(found, int | float):
        return math.isclose(found, expected, rel_tol=1e-6, abs_tol=1e-9)
    if type(found) is not type(expected):
        return False
    if isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(map(_same, found, expected))
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(
            _same(found[key], expected[key]) for key in expected
        )
    return found == expected


def _read_case(test: Any, label: str, entry_point: str) -> Case:
    if isinstance(test, str):
        return _read_assertion(test, label, entry_point)
    if not isinstance(test, Mapping) or not {"args", "expected"} <= test.keys():
        raise ValueError(f"{label} must have 'args' and 'expected', or be an assertion: {test!r}")
    case = Case(tuple(test["args"]), test["expected"], dict(test.get("kwargs", {})))
    try:
        whole = (case.args, case.expected, dict(case.kwargs))
        is_literal = ast.literal_eval(repr(whole)) == whole
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        is_literal = False
    if not is_literal:
        raise ValueError(f"{label} holds more than Python literals: {test!r}")
    return case


def _read_assertion(text: str, label: str, entry_point: str) -> Case:
    try:
        (statement,) = ast.parse(text.strip()).body
        assert isinstance(statement, ast.Assert) and isinstance(statement.test, ast.Compare)
        call, (operator,), (expected,) = (
            statement.test.left,
            statement.test.ops,
            statement.test.comparators,
        )
        assert isinstance(operator, ast.Eq) and isinstance(call, ast.Call)
        assert isinstance(call.func, ast.Name) and call.func.id == entry_point
        kwargs = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        args = tuple(map(ast.literal_eval, call.args))
        return Case(args, ast.literal_eval(expected), {str(key): kwargs[key] for key in kwargs})
    except (AssertionError, ValueError, SyntaxError, MemoryError, RecursionError):
        raise ValueError(
            f"{label} is not of the form `assert {entry_point}(...) == ...` with Python literals: "
            f"{text!r}"
        ) from None
