"""Evaluates the expressions of hidden tests, and compares values as Python's `==` does. Pure.

An expression consists of literals, operators, a few functions, and names with known values. Nothing
else is evaluated, no code is executed, and what a number, a text or a list may grow to is bounded.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

VALUE = "_value"
"""Name that stands for the returned value in a condition."""
_MAX_DEPTH = 50
MAX_ITEMS = 100_000
"""Most items of a list and characters of a text that an expression makes."""
_MAX_BITS = 100_000  # of an integer


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


def is_literal(value: Any) -> bool:
    """Whether a value can be written as a Python literal and read back."""
    try:
        return ast.literal_eval(repr(value)) == value
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return False


def read_value(written: str) -> Any:
    """Read the text of a value, which is a literal that may contain `inf` and `nan`.

    Raises:
        ValueError, SyntaxError: It is something else.
    """
    try:
        return ast.literal_eval(written)
    except ValueError:
        return ast.literal_eval(_Infinities().visit(ast.parse(written, mode="eval")))


class _Infinities(ast.NodeTransformer):
    """Replaces the names that Python writes for floats that have no literal."""

    def visit_Name(self, node: ast.Name) -> ast.AST:
        is_float = node.id in ("inf", "nan")
        return ast.Constant(float(node.id)) if is_float else node


def _bounded_range(*arguments: Any) -> list[int]:
    found = range(*arguments)
    if len(found) > MAX_ITEMS:
        raise ValueError("too long")
    return list(found)


_TYPES = {each.__name__: each for each in (int, float, str, list, tuple, dict, set, bool, bytes)}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{
        each.__name__: each for each in (set, frozenset, sorted, list, tuple, dict, len, abs, round)
    },
    **{each.__name__: each for each in (sum, min, max, bool, int, float, str, any, all)},
    "range": _bounded_range,
    "isinstance": isinstance,
    "math.isclose": math.isclose,
    "isclose": math.isclose,
    "math.fabs": math.fabs,
}
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: is_same,
    ast.NotEq: lambda x, y: not is_same(x, y),
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda x, y: x in y,
    ast.NotIn: lambda x, y: x not in y,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}
_OPERATIONS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_PLAIN_NODES = (
    *(ast.Constant, ast.expr_context, ast.keyword, ast.Slice, ast.Subscript, ast.BoolOp),
    *(ast.UnaryOp, ast.BinOp, ast.Compare, ast.List, ast.Tuple, ast.Set, ast.Dict),
    *(ast.ListComp, ast.GeneratorExp, ast.comprehension),
    *(ast.boolop, ast.unaryop, ast.cmpop, *_OPERATIONS),
)


def check_condition(condition: ast.expr) -> None:
    """Raise ValueError if a condition uses what `evaluate` does not know."""
    bound = {
        each.target.id
        for each in ast.walk(condition)
        if isinstance(each, ast.comprehension) and isinstance(each.target, ast.Name)
    }
    for node in ast.walk(condition):
        match node:
            case ast.Call():
                if _name(node.func) not in _FUNCTIONS or any(not key.arg for key in node.keywords):
                    raise ValueError("an unknown function")
            case ast.Name(id=name):
                if name not in (VALUE, "math", *_FUNCTIONS, *_TYPES, *bound):
                    raise ValueError("an unknown name")
            case ast.Attribute():
                if _name(node) not in _FUNCTIONS:
                    raise ValueError("an unknown attribute")
            case ast.ListComp(generators=parts) | ast.GeneratorExp(generators=parts):
                if len(parts) > 1:
                    raise ValueError("an unknown form")
            case _:
                if not isinstance(node, _PLAIN_NODES):
                    raise ValueError("an unknown form")


def _name(function: ast.expr) -> str:
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
        return f"{function.value.id}.{function.attr}"
    return function.id if isinstance(function, ast.Name) else ""


def evaluate(node: ast.expr, names: Mapping[str, Any], depth: int = 0) -> Any:
    """Evaluate an expression; raise if it is more than this module knows.

    Args:
        node: The expression.
        names: Values of names.
        depth: How deeply it is nested in another one.
    """
    if depth > _MAX_DEPTH:
        raise ValueError("nested too deeply")

    def inner(each: ast.expr) -> Any:
        return evaluate(each, names, depth + 1)

    match node:
        case ast.Constant(value=constant):
            return constant
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.Name(id=name) if name in _TYPES:
            return _TYPES[name]
        case ast.List(elts=items):
            return [inner(each) for each in items]
        case ast.Tuple(elts=items):
            return tuple(inner(each) for each in items)
        case ast.Set(elts=items):
            return {inner(each) for each in items}
        case ast.Dict(keys=keys, values=values) if all(keys):
            pairs = zip(keys, values, strict=True)
            return {inner(key): inner(each) for key, each in pairs if key is not None}
        case (
            ast.ListComp(elt=item, generators=[generator])
            | ast.GeneratorExp(elt=item, generators=[generator])
        ):
            return [
                evaluate(item, {**names, **each}, depth + 1)
                for each in _drawn(generator, names, depth)
            ]
        case ast.BoolOp(op=ast.And(), values=values):
            return all(inner(each) for each in values)
        case ast.BoolOp(op=ast.Or(), values=values):
            return any(inner(each) for each in values)
        case ast.UnaryOp(op=sign, operand=operand):
            found = inner(operand)
            return (not found) if isinstance(sign, ast.Not) else _signed(sign, found)
        case ast.BinOp(left=left, op=operation, right=right):
            return _calculate(operation, inner(left), inner(right))
        case ast.Compare(left=left, ops=operators, comparators=others):
            terms = [inner(each) for each in (left, *others)]
            return all(
                _COMPARISONS[type(each)](x, y)
                for each, x, y in zip(operators, terms, terms[1:], strict=False)
            )
        case ast.Subscript(value=whole, slice=ast.Slice(lower=low, upper=high, step=step)):
            bounds = [None if each is None else inner(each) for each in (low, high, step)]
            return inner(whole)[slice(*bounds)]
        case ast.Subscript(value=whole, slice=index):
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


def _drawn(
    generator: ast.comprehension, names: Mapping[str, Any], depth: int
) -> Iterator[dict[str, Any]]:
    """Yield the names that each item of a comprehension with one variable binds."""
    if not isinstance(generator.target, ast.Name) or generator.is_async:
        raise ValueError("an unknown form")
    for item in evaluate(generator.iter, names, depth + 1):
        bound = {generator.target.id: item}
        if all(evaluate(each, {**names, **bound}, depth + 1) for each in generator.ifs):
            yield bound


def _signed(sign: ast.unaryop, value: Any) -> Any:
    if not isinstance(value, int | float | complex):
        raise TypeError("a sign before something other than a number")
    return -value if isinstance(sign, ast.USub) else value


def _calculate(operation: ast.operator, x: Any, y: Any) -> Any:
    numbers = (int, float, complex)
    known = _OPERATIONS.get(type(operation))
    if known is None:
        raise ValueError("an unknown operator")
    if isinstance(operation, ast.Mult) and isinstance(x, list | str) and isinstance(y, int):
        if len(x) * y > MAX_ITEMS:
            raise ValueError("too long")
        return x * y
    if isinstance(operation, ast.Add) and type(x) is type(y) and isinstance(x, list | tuple | str):
        return x + y
    if not isinstance(x, numbers) or not isinstance(y, numbers):
        raise TypeError("an operation on something other than numbers")
    if isinstance(operation, ast.Pow) and _bits_of_power(x, y) > _MAX_BITS:
        raise ValueError("too large")
    return known(x, y)


def _bits_of_power(x: Any, y: Any) -> int:
    """How many bits an integer power has at most; 0 if it is none."""
    return x.bit_length() * max(y, 0) if isinstance(x, int) and isinstance(y, int) else 0
