"""Reads the hidden tests of a coding task, in the forms of public data sets.

A task is tested by calling a function (`code_tests`), or by running a whole program with a text on
stdin and comparing what it writes to stdout. Nothing here evaluates code.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tir_alp.tools.code_tests import Case, check_entry_point, is_literal, read_cases

MAX_OUTPUT_CHARS = 900_000
"""The longest output of a program that can be compared."""
_TEST_KEYS = frozenset(("input", "output", "inputs", "outputs"))


@dataclass(frozen=True, slots=True)
class ProgramCase:
    """One hidden test of a program: its standard input, and the output that it has to write."""

    stdin: str
    expected: str
    tolerance: float = 0.0
    """Largest difference of two numbers, absolute or relative to the larger; 0: texts are equal."""

    def is_passed(self, stdout: str) -> bool:
        """Whether an output has the same tokens on the same lines, up to space at their ends."""
        found, expected = _lines(stdout), _lines(self.expected)
        return len(found) == len(expected) and all(map(self._is_same_line, found, expected))

    def _is_same_line(self, found: str, expected: str) -> bool:
        tokens = found.split(), expected.split()
        return len(tokens[0]) == len(tokens[1]) and all(map(self._is_same_token, *tokens))

    def _is_same_token(self, found: str, expected: str) -> bool:
        if found == expected:
            return True
        if not self.tolerance:
            return False
        try:
            x, y = float(found), float(expected)
        except ValueError:
            return False
        return math.isclose(x, y, rel_tol=self.tolerance, abs_tol=self.tolerance)


@dataclass(frozen=True, slots=True)
class FunctionTests:
    """Tests that call a function, or a method of `Solution` if the program has such a class."""

    entry_point: str
    cases: tuple[Case, ...]


@dataclass(frozen=True, slots=True)
class ProgramTests:
    """Tests that run the whole program."""

    cases: tuple[ProgramCase, ...]


def has_tests(task: Mapping[str, Any]) -> bool:
    """Whether a row is a coding task, so that its tests have to be readable."""
    if "tests" not in task:
        return False
    if "entry_point" in task:
        return True
    tests = task["tests"]
    if isinstance(tests, str):
        return tests.lstrip().startswith(("{", "[")) and any(
            f'"{key}"' in tests for key in _TEST_KEYS
        )
    listed = tests if isinstance(tests, Sequence) else [tests]
    return any(isinstance(each, Mapping) and _TEST_KEYS & each.keys() for each in listed)


def read_tests(task: Mapping[str, Any]) -> FunctionTests | ProgramTests:
    """Read the tests of a task.

    Args:
        task: A row with `tests`, as an object or as JSON text: the forms of `read_cases`, with the
            name of the function as `entry_point`; `{"inputs": [...], "outputs": [...]}` as in APPS,
            with a `fn_name` if a function is tested; or a list of `{"input": ..., "output": ...,
            "testtype": "stdin" or "functional"}` as in LiveCodeBench. `tolerance` is the largest
            difference of two numbers in the output of a program.

    Raises:
        ValueError: The tests have none of these forms; the message names the test.
    """
    tests, entry_point = task["tests"], task.get("entry_point")
    if isinstance(tests, str) and tests.lstrip().startswith(("{", "[")):
        try:
            tests = json.loads(tests)
        except (ValueError, RecursionError):
            raise ValueError(f"'tests' is no JSON: {tests!r:.100}") from None
    if isinstance(tests, Mapping):
        return _read_columns(tests, entry_point, _tolerance_of(task))
    listed = tests if isinstance(tests, Sequence) else ()
    if listed and all(isinstance(t, Mapping) and {"input", "output"} & t.keys() for t in listed):
        return _read_rows(listed, entry_point, _tolerance_of(task))
    return FunctionTests(check_entry_point(entry_point), tuple(read_cases(tests, entry_point)))


def _tolerance_of(task: Mapping[str, Any]) -> float:
    tolerance = task.get("tolerance") or 0.0
    if not isinstance(tolerance, int | float) or not 0 <= tolerance < 1:
        raise ValueError(f"'tolerance' must be a number from 0 to 1, not {tolerance!r:.100}")
    return float(tolerance)


def _read_columns(
    tests: Mapping[str, Any], entry_point: Any, tolerance: float
) -> FunctionTests | ProgramTests:
    """Read the form of APPS."""
    columns = tests.get("inputs"), tests.get("outputs")
    for name, column in zip(("inputs", "outputs"), columns, strict=True):
        if not isinstance(column, Sequence) or isinstance(column, str) or not column:
            raise ValueError(f"'tests' must have a list {name!r} that is not empty: {tests!r:.100}")
    inputs, outputs = (list(column or ()) for column in columns)
    if len(inputs) != len(outputs):
        raise ValueError(f"'tests' has {len(inputs)} inputs, but {len(outputs)} outputs")
    pairs = list(enumerate(zip(inputs, outputs, strict=True)))
    name = tests.get("fn_name") or entry_point
    if name is None:
        return ProgramTests(
            tuple(_program_case(f"test {k}", given, out, tolerance) for k, (given, out) in pairs)
        )
    cases = [_function_case(f"test {k}", given, out) for k, (given, out) in pairs]
    return FunctionTests(check_entry_point(name), tuple(cases))


def _read_rows(
    tests: Sequence[Mapping[str, Any]], entry_point: Any, tolerance: float
) -> FunctionTests | ProgramTests:
    """Read the form of LiveCodeBench."""
    kinds = {test.get("testtype", "stdin") for test in tests}
    if len(kinds) != 1 or not kinds <= {"stdin", "functional"}:
        raise ValueError(f"'tests' must all be of testtype 'stdin' or 'functional', not {kinds!r}")
    labelled = [(f"test {number}", test) for number, test in enumerate(tests)]
    for label, test in labelled:
        if not {"input", "output"} <= test.keys():
            raise ValueError(f"{label} must have 'input' and 'output': {test!r:.100}")
    if kinds == {"stdin"}:
        return ProgramTests(
            tuple(_program_case(label, t["input"], t["output"], tolerance) for label, t in labelled)
        )
    cases = []
    for label, test in labelled:
        try:
            args = [json.loads(line) for line in test["input"].splitlines() if line.strip()]
            expected = json.loads(test["output"])
        except (ValueError, AttributeError, TypeError, RecursionError):
            raise ValueError(
                f"{label} must have an 'input' with one JSON value per line and an 'output' with "
                f"one: {test!r:.100}"
            ) from None
        cases.append(Case(tuple(args), expected, lists_are_tuples=True))
    return FunctionTests(check_entry_point(entry_point), tuple(cases))


def _function_case(label: str, given: Any, expected: Any) -> Case:
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise ValueError(f"{label} must have a list of arguments, not {given!r:.100}")
    if not is_literal((tuple(given), expected)):
        raise ValueError(f"{label} holds more than Python literals: {given!r:.100}")
    wrapped = isinstance(expected, list) and len(expected) == 1
    also = (expected[0],) if wrapped else ()  # APPS writes a value as [value], but not always
    return Case(tuple(given), expected, lists_are_tuples=True, also_expected=also)


def _program_case(label: str, given: Any, expected: Any, tolerance: float) -> ProgramCase:
    texts = _text(given), _text(expected)
    if texts[0] is None or texts[1] is None:
        raise ValueError(
            f"{label} must have texts as input and output, or lists of lines, not "
            f"{given!r:.60} and {expected!r:.60}"
        )
    if len(texts[1]) > MAX_OUTPUT_CHARS:
        raise ValueError(f"{label} expects {len(texts[1])} characters, over {MAX_OUTPUT_CHARS}")
    return ProgramCase(texts[0], texts[1], tolerance)


def _text(value: Any) -> str | None:
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence) and all(isinstance(line, str) for line in value):
        return "\n".join(value)
    return None


def _lines(text: str) -> list[str]:
    return text.rstrip().splitlines()
