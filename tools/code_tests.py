"""Hidden tests of a function: read from a task, and decided on the host by the value returned.

A test is a call, and what its value has to fulfil. The value comes from a program that is not
trusted, as the text of a Python literal: nothing here evaluates code, and values are compared by
Python's `==` between plain types only.
"""

from __future__ import annotations

import ast
import keyword
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_VALUE = "_value"  # stands for the returned value in a condition
_MAX_DEPTH = 50
_MAX_ITEMS = 100_000


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

    def is_passed(self, written: str | None) -> bool:
        """Whether a returned value, as the text of a literal, passes; None stands for None."""
        try:
            value = None if written is None else ast.literal_eval(written)
            if self.lists_are_tuples:
                value = _with_lists(value)
            if not self.condition:
                rights = (self.expected, *self.also_expected)
                return any(is_same(value, right) for right in rights)
            return bool(_evaluate(ast.parse(self.condition, mode="eval").body, value))
        except (ValueError, SyntaxError, TypeError, ArithmeticError, MemoryError, RecursionError):
            return False


def _with_lists(value: Any) -> Any:
    """Write every tuple as a list, and keys of a dict as JSON has them."""
    if isinstance(value, list | tuple):
        return [_with_lists(each) for each in value]
    if isinstance(value, dict):
        return {str(key): _with_lists(each) for key, each in value.items()}
    return value


def is_same(found: Any, expected: Any) -> bool:
    """Whether two plain values are equal as Python has it; floats may differ by one millionth."""
    numbers = (int, float, complex)
    if isinstance(expected, numbers) and isinstance(found, numbers):
        if isinstance(expected, complex) or isinstance(found, complex):
            return found == expected
        if isinstance(expected, float) or isinstance(found, float):
            return math.isclose(found, expected, rel_tol=1e-6, abs_tol=1e-9)
        return found == expected
    if isinstance(expected, set | frozenset) and isinstance(found, set | frozenset):
        return found == expected
    if type(found) is not type(expected):
        return False
    if isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(map(is_same, found, expected))
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(
            is_same(found[key], expected[key]) for key in expected
        )
    return found == expected


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
        tests = _assertions_of(tests, entry_point)
    if not isinstance(tests, Sequence) or isinstance(tests, str) or not tests:
        raise ValueError("'tests' must be a list that is not empty")
    return [_read_case(test, f"test {number}", entry_point) for number, test in enumerate(tests)]


def check_entry_point(name: Any) -> str:
    """Return the name of a function. Raises ValueError if it is none."""
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
        raise ValueError(f"'entry_point' must be the name of a function, not {name!r}")
    return name


def _assertions_of(text: str, entry_point: str) -> list[str]:
    """Return the assertions of HumanEval's `check(candidate)`, about the entry point."""
    try:
        checks = [
            each
            for each in ast.parse(text).body
            if isinstance(each, ast.FunctionDef) and each.name == "check"
        ]
        (check,) = checks
        (candidate,) = check.args.args
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise ValueError("'tests' is no text with one function check(candidate)") from None
    found = []
    for statement in check.body:
        if isinstance(statement, ast.Pass | ast.Expr | ast.Import | ast.ImportFrom):
            continue
        if not isinstance(statement, ast.Assert):
            raise ValueError(f"'tests' holds more than assertions: {ast.unparse(statement):.100}")
        if isinstance(statement.test, ast.Constant) and statement.test.value is True:
            continue
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and node.id == candidate.arg:
                node.id = entry_point
        found.append(ast.unparse(statement))
    return found


def _read_case(test: Any, label: str, entry_point: str) -> Case:
    if isinstance(test, str):
        return _read_assertion(test, label, entry_point)
    if not isinstance(test, Mapping) or not {"args", "expected"} <= test.keys():
        raise ValueError(f"{label} must have 'args' and 'expected', or be an assertion: {test!r}")
    case = Case(tuple(test["args"]), test["expected"], dict(test.get("kwargs", {})))
    if not is_literal((case.args, case.expected, dict(case.kwargs))):
        raise ValueError(f"{label} holds more than Python literals: {test!r}")
    return case


def is_literal(value: Any) -> bool:
    """Whether a value can be written as a Python literal and read back."""
    try:
        return ast.literal_eval(repr(value)) == value
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return False


def _read_assertion(text: str, label: str, entry_point: str) -> Case:
    try:
        (statement,) = ast.parse(text.strip()).body
        assert isinstance(statement, ast.Assert)
        calls = _Calls(entry_point)
        condition = calls.visit(statement.test)
        (call,) = calls.found
        kwargs = {str(keyword.arg): _evaluate(keyword.value, None) for keyword in call.keywords}
        args = tuple(_evaluate(argument, None) for argument in call.args)
        assert is_literal((args, kwargs)) and all(keyword.arg for keyword in call.keywords)
        match condition:
            case ast.Compare(left=ast.Name(id=name), ops=[ast.Eq()], comparators=[expected]) if (
                name == _VALUE
            ):
                value = _evaluate(expected, None)
                assert is_literal(value)
                return Case(args, value, kwargs)
            case _:
                _check(condition)
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
            return ast.Name(id=_VALUE, ctx=ast.Load())
        return self.generic_visit(node)


# --------------------------------------------------------------------------------- conditions

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "set": set,
    "frozenset": frozenset,
    "sorted": sorted,
    "list": list,
    "tuple": tuple,
    "dict": dict,
    "len": len,
    "abs": abs,
    "round": round,
    "sum": sum,
    "min": min,
    "max": max,
    "bool": bool,
    "int": int,
    "float": float,
    "math.isclose": math.isclose,
    "isclose": math.isclose,
}
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: is_same,
    ast.NotEq: lambda x, y: not is_same(x, y),
    ast.Lt: lambda x, y: x < y,
    ast.LtE: lambda x, y: x <= y,
    ast.Gt: lambda x, y: x > y,
    ast.GtE: lambda x, y: x >= y,
    ast.In: lambda x, y: x in y,
    ast.NotIn: lambda x, y: x not in y,
    ast.Is: lambda x, y: x is y,
    ast.IsNot: lambda x, y: x is not y,
}


def _check(condition: ast.expr) -> None:
    """Raise ValueError if a condition uses what `_evaluate` does not know."""
    for node in ast.walk(condition):
        match node:
            case ast.Call():
                if _name(node.func) not in _FUNCTIONS or any(not key.arg for key in node.keywords):
                    raise ValueError("an unknown function")
            case ast.Name(id=name):
                if name != _VALUE and name not in _FUNCTIONS and name != "math":
                    raise ValueError("an unknown name")
            case ast.Is() | ast.IsNot() | ast.Constant() | ast.expr_context() | ast.keyword():
                pass
            case ast.Attribute():
                if _name(node) not in _FUNCTIONS:
                    raise ValueError("an unknown attribute")
            case ast.BoolOp() | ast.UnaryOp() | ast.BinOp() | ast.Compare():
                pass
            case ast.List() | ast.Tuple() | ast.Set() | ast.Dict() | ast.Subscript():
                pass
            case ast.boolop() | ast.unaryop() | ast.cmpop():
                pass
            case ast.Add() | ast.Sub() | ast.Mult() | ast.Div():
                pass
            case _:
                raise ValueError("an unknown form")


def _name(function: ast.expr) -> str:
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
        return f"{function.value.id}.{function.attr}"
    return function.id if isinstance(function, ast.Name) else ""


def _evaluate(node: ast.expr, value: Any, depth: int = 0) -> Any:
    """Evaluate an expression of literals, a few functions and `_value`; raise if it is more."""
    if depth > _MAX_DEPTH:
        raise ValueError("nested too deeply")

    def inner(each: ast.expr) -> Any:
        return _evaluate(each, value, depth + 1)

    match node:
        case ast.Constant(value=constant):
            return constant
        case ast.Name(id=name) if name == _VALUE:
            return value
        case ast.List(elts=items):
            return [inner(each) for each in items]
        case ast.Tuple(elts=items):
            return tuple(inner(each) for each in items)
        case ast.Set(elts=items):
            return {inner(each) for each in items}
        case ast.Dict(keys=keys, values=values) if all(keys):
            pairs = zip(keys, values, strict=True)
            return {inner(key): inner(each) for key, each in pairs if key is not None}
        case ast.BoolOp(op=ast.And(), values=values):
            return all(inner(each) for each in values)
        case ast.BoolOp(op=ast.Or(), values=values):
            return any(inner(each) for each in values)
        case ast.UnaryOp(op=operator, operand=operand):
            found = inner(operand)
            return (not found) if isinstance(operator, ast.Not) else _signed(operator, found)
        case ast.BinOp(left=left, op=operator, right=right):
            return _calculate(operator, inner(left), inner(right))
        case ast.Compare(left=left, ops=operators, comparators=others):
            terms = [inner(each) for each in (left, *others)]
            return all(
                _COMPARISONS[type(operator)](x, y)
                for operator, x, y in zip(operators, terms, terms[1:], strict=False)
            )
        case ast.Subscript(value=whole, slice=index) if not isinstance(index, ast.Slice):
            try:
                return inner(whole)[inner(index)]
            except LookupError as error:
                raise ValueError(str(error)) from None
        case ast.Call(func=function, args=arguments, keywords=keywords):
            known = _FUNCTIONS.get(_name(function))
            if known is None:
                raise ValueError("an unknown function")
            named = {str(key.arg): inner(key.value) for key in keywords}
            return known(*map(inner, arguments), **named)
        case _:
            raise ValueError("an unknown form")


def _signed(operator: ast.unaryop, value: Any) -> Any:
    if not isinstance(value, int | float | complex):
        raise TypeError("a sign before something other than a number")
    return -value if isinstance(operator, ast.USub) else value


def _calculate(operator: ast.operator, x: Any, y: Any) -> Any:
    numbers = (int, float, complex)
    if isinstance(operator, ast.Mult) and isinstance(x, list | str) and isinstance(y, int):
        if len(x) * y > _MAX_ITEMS:
            raise ValueError("too long")
        return x * y
    if isinstance(operator, ast.Add) and type(x) is type(y) and isinstance(x, list | tuple | str):
        return x + y
    if not isinstance(x, numbers) or not isinstance(y, numbers):
        raise TypeError("an operation on something other than numbers")
    match operator:
        case ast.Add():
            return x + y
        case ast.Sub():
            return x - y
        case ast.Mult():
            return x * y
        case ast.Div():
            return x / y
    raise ValueError("an unknown operator")
