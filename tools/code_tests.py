"""Hidden tests of a function: read from a task, and decided on the host by the value returned.

A test is a call, and what its value has to fulfil. The value comes from a program that is not
trusted, as the text of a Python literal: nothing here evaluates code, and values are compared by
Python's `==` between plain types only.
"""

from __future__ import annotations

import ast
import keyword
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tir_alp.tools.code_checks import assertions_of
from tir_alp.tools.code_values import (
    VALUE,
    check_condition,
    evaluate,
    is_literal,
    is_same,
    read_value,
)


@dataclass(frozen=True, slots=True)
class Case:
    """One hidden test: the arguments of a call, and the value that it has to return.

    Example: `Case(args=([3, 1, 2],), expected=[1, 2, 3])`.
    """

    args: tuple[Any, ...]
    expected: Any
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    condition: str = ""
    """Expression that has to be true of `_value`, in place of a value to return; may be empty."""
    also_expected: tuple[Any, ...] = ()
    """Other values that are right."""
    lists_are_tuples: bool = False
    """Whether a tuple passes where a list is expected: JSON has no tuples."""

    @property
    def is_of_truth(self) -> bool:
        """Whether the condition only asks if the value is true, as `assert f(x)` does."""
        return self.condition in (VALUE, f"not {VALUE}")

    def is_passed(self, written: str | None) -> bool:
        """Whether a returned value, as the text of a literal, passes; None stands for None."""
        try:
            value = None if written is None else read_value(written)
            if self.lists_are_tuples:
                value = _with_lists(value)
            if not self.condition:
                rights = (self.expected, *self.also_expected)
                return any(is_same(value, right) for right in rights)
            return bool(evaluate(ast.parse(self.condition, mode="eval").body, {VALUE: value}))
        except (ValueError, SyntaxError, TypeError, ArithmeticError, MemoryError, RecursionError):
            return False


def _with_lists(value: Any) -> Any:
    """Write every tuple as a list, and keys of a dict as JSON has them."""
    if isinstance(value, list | tuple):
        return [_with_lists(each) for each in value]
    if isinstance(value, dict):
        return {str(key): _with_lists(each) for key, each in value.items()}
    return value


def read_cases(tests: Any, entry_point: Any) -> list[Case]:
    """Read the tests of a task.

    Args:
        tests: A list of objects with `args`, `expected` and optionally `kwargs`, or of assertions
            about one call, such as `assert f(1, 2) == 3` in MBPP; or the text of a function
            `check(candidate)` with such assertions, as in HumanEval.
        entry_point: Name of the function.

    Raises:
        ValueError: A test, which the message names, has none of these forms, or holds values other
            than Python literals.
    """
    check_entry_point(entry_point)
    if isinstance(tests, str) and "def check(" in tests:
        tests = assertions_of(tests, entry_point)
    if not isinstance(tests, Sequence) or isinstance(tests, str) or not tests:
        raise ValueError("'tests' must be a list that is not empty")
    return [_read_case(test, f"test {number}", entry_point) for number, test in enumerate(tests)]


def check_entry_point(name: Any) -> str:
    """Return the name of a function. Raises ValueError if it is none."""
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
        raise ValueError(f"'entry_point' must be the name of a function, not {name!r}")
    return name


def _read_case(test: Any, label: str, entry_point: str) -> Case:
    if isinstance(test, str):
        return _read_assertion(test, label, entry_point)
    if not isinstance(test, Mapping) or not {"args", "expected"} <= test.keys():
        raise ValueError(f"{label} must have 'args' and 'expected', or be an assertion: {test!r}")
    case = Case(tuple(test["args"]), test["expected"], dict(test.get("kwargs", {})))
    if not is_literal((case.args, case.expected, dict(case.kwargs))):
        raise ValueError(f"{label} holds more than Python literals: {test!r}")
    return case


def _read_assertion(text: str, label: str, entry_point: str) -> Case:
    try:
        (statement,) = ast.parse(text.strip()).body
        assert isinstance(statement, ast.Assert)
        calls = _Calls(entry_point)
        condition = calls.visit(statement.test)
        call, *others = calls.found
        assert all(ast.dump(each) == ast.dump(call) for each in others)
        kwargs = {str(keyword.arg): evaluate(keyword.value, {}) for keyword in call.keywords}
        args = tuple(evaluate(argument, {}) for argument in call.args)
        assert is_literal((args, kwargs)) and all(keyword.arg for keyword in call.keywords)
        match condition:
            case ast.Compare(left=ast.Name(id=name), ops=[ast.Eq()], comparators=[expected]) if (
                name == VALUE
            ):
                if VALUE not in {
                    each.id for each in ast.walk(expected) if isinstance(each, ast.Name)
                }:
                    value = evaluate(expected, {})
                    if is_literal(value):
                        return Case(args, value, kwargs)
                    repr(value)  # raises if it has too many digits
        check_condition(condition)
        return Case(args, None, kwargs, ast.unparse(condition))
    except (AssertionError, ArithmeticError, TypeError, ValueError, SyntaxError) as error:
        raise ValueError(_no_assertion(text, label, entry_point)) from error
    except (MemoryError, RecursionError):
        raise ValueError(_no_assertion(text, label, entry_point)) from None


def _no_assertion(text: str, label: str, entry_point: str) -> str:
    return (
        f"{label} is not of the form `assert {entry_point}(...) == ...` with Python literals, or a "
        f"condition on one such call: {text!r}"
    )


class _Calls(ast.NodeTransformer):
    """Replaces the calls of the function by the name of its value."""

    def __init__(self, entry_point: str):
        self._entry_point = entry_point
        self.found: list[ast.Call] = []

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if isinstance(node.func, ast.Name) and node.func.id == self._entry_point:
            self.found.append(node)
            return ast.Name(id=VALUE, ctx=ast.Load())
        return self.generic_visit(node)
