"""A calculator: the smallest example of a tool. Exact, and bounded by the size of its numbers."""

from __future__ import annotations

import ast
import operator
import time
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from tir_alp.tools.base import NoSession, ToolResult, ToolSession, refused_call
from tir_alp.tools.outcome import Outcome

_MOST_CHARS = 1000
_MOST_BITS = 4096  # of a numerator or denominator, so that no operation takes long

_OPERATORS: dict[type, Callable[[Fraction, Fraction], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


class CalculatorTool:
    """Evaluates an arithmetic expression in exact fractions."""

    name = "calculator"
    description = (
        "Works out an arithmetic expression of numbers, + - * / // % ** and parentheses, exactly."
    )
    parameters: Mapping[str, Any] = {
        "type": "object",
        "properties": {"expression": {"type": "string", "description": "For example 2*(3+4)/5"}},
        "required": ["expression"],
        "additionalProperties": False,
    }

    def open_session(self) -> NoSession:
        """A session that keeps nothing."""
        return NoSession()

    def run(self, arguments: Mapping[str, Any], session: ToolSession) -> ToolResult:
        """Evaluate `arguments["expression"]`."""
        began = time.perf_counter()
        try:
            text = _as_text(evaluate(arguments["expression"]))
        except (ValueError, ZeroDivisionError) as error:
            return refused_call(str(error))
        return ToolResult(outcome=Outcome.OK, text=text, duration_s=time.perf_counter() - began)


def evaluate(expression: str) -> Fraction:
    """Return the value of an arithmetic expression.

    Raises:
        ValueError: It is not an arithmetic expression, or its numbers become too large.
        ZeroDivisionError: It divides by zero.
    """
    if len(expression) > _MOST_CHARS:
        raise ValueError(f"the expression is longer than {_MOST_CHARS} characters")
    try:
        return _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"this is not an arithmetic expression: {error}") from None


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=bool() | complex() | str() | bytes() | None):
            pass
        case ast.Constant(value=int() | float() as number):
            # Decimals are taken as they are written: 0.1 is a tenth.
            return _bounded(
                Fraction(str(number)) if isinstance(number, float) else Fraction(number)
            )
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _power(_value(left), _value(right))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _bounded(Fraction(_OPERATORS[type(op)](_value(left), _value(right))))
    raise ValueError(f"the calculator does not know {ast.unparse(node)[:100]!r}")


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise ValueError(f"the exponent {exponent} is not a whole number")
    if _bits(base) * abs(exponent.numerator) > _MOST_BITS:
        raise ValueError("the numbers become too large")
    return base**exponent.numerator


def _bounded(number: Fraction) -> Fraction:
    if _bits(number) > _MOST_BITS:
        raise ValueError("the numbers become too large")
    return number


def _bits(number: Fraction) -> int:
    return max(number.numerator.bit_length(), number.denominator.bit_length())


def _as_text(number: Fraction) -> str:
    if number.denominator == 1:
        return str(number.numerator)
    try:
        return f"{number} = {float(number):.12g}"
    except OverflowError:
        return str(number)
