"""Reads the function `check(candidate)` of a task of HumanEval as a list of assertions.

Loops over known values are unrolled, and names with known values replaced; nothing is executed. A
function that needs more, such as random numbers, is refused.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from typing import Any

from tir_alp.tools.code_values import evaluate, is_literal

_MAX_ASSERTIONS = 10_000


def assertions_of(text: str, entry_point: str) -> list[str]:
    """Return the assertions of a function `check(candidate)`, about the entry point.

    Raises:
        ValueError: The text has no such function, or one with statements of another kind.
    """
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
    found: list[str] = []
    for assertion in _unrolled(check.body, {candidate.arg: ast.Name(entry_point, ast.Load())}):
        found.append(ast.unparse(assertion))
        if len(found) > _MAX_ASSERTIONS:
            raise ValueError(f"'tests' has more than {_MAX_ASSERTIONS} assertions")
    return found


def _unrolled(body: Sequence[ast.stmt], known: dict[str, ast.expr]) -> Iterator[ast.Assert]:
    """Yield the assertions that statements make, with the expressions that names stand for."""
    for statement in body:
        match statement:
            case ast.Pass() | ast.Expr() | ast.Import() | ast.ImportFrom():
                pass
            case ast.Assert(test=ast.Constant(value=True)):
                pass
            case ast.Assert():
                yield _Known(known).visit(ast.parse(ast.unparse(statement)).body[0])
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                known[name] = _as_literal(_value_of(value, known, statement))
            case ast.For(target=ast.Name(id=name), iter=items, body=inner, orelse=[]):
                for item in _value_of(items, known, statement):
                    yield from _unrolled(inner, known | {name: _as_literal(item)})
            case _:
                raise _refusal(statement)


def _value_of(node: ast.expr, known: dict[str, ast.expr], statement: ast.stmt) -> Any:
    """Evaluate an expression in which the function is not called."""
    try:
        names = {
            name: ast.literal_eval(each)
            for name, each in known.items()
            if not isinstance(each, ast.Name)
        }
        return evaluate(node, names)
    except (ArithmeticError, LookupError, TypeError, ValueError):
        raise _refusal(statement) from None


def _as_literal(value: Any) -> ast.expr:
    if not is_literal(value):
        raise ValueError(f"'tests' computes something other than a literal: {value!r:.100}")
    return ast.parse(repr(value), mode="eval").body


def _refusal(statement: ast.stmt) -> ValueError:
    return ValueError(f"'tests' holds more than assertions: {ast.unparse(statement):.100}")


class _Known(ast.NodeTransformer):
    """Replaces names by the expressions that they stand for."""

    def __init__(self, known: dict[str, ast.expr]):
        self._known = known

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return self._known.get(node.id, node)
