"""Bounds on the size of an expression and of the numbers that it stands for, before evaluation."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import sympy

_MAX_DIGITS = 5000  # of any number that an expression stands for
_MAX_NODES = 600
MAX_DEPTH = 40
"""Nesting of an expression that is read."""
MAX_ARGUMENT_DIGITS = 3.7
"""Log10 of the largest argument of a factorial."""


class TooLarge(Exception):
    """An expression stands for a number of too many digits, or is itself too large."""


def check_size(value: Any) -> None:
    """Raise `TooLarge` for an expression that would take long or much memory to evaluate."""
    stack, nodes = [(value, 0)], 0
    while stack:
        each, depth = stack.pop()
        nodes += 1
        if nodes > _MAX_NODES or depth > MAX_DEPTH:
            raise TooLarge
        if isinstance(each, sympy.Basic):
            stack += [(child, depth + 1) for child in each.args]
    digits_of(value)


def in_one_order(value: Any, depth: int = 0) -> Any:
    """Sort the terms of sums and the factors of products, evaluating nothing."""
    if not isinstance(value, sympy.Basic) or value.is_Atom or depth > MAX_DEPTH:
        return value
    args = [in_one_order(each, depth + 1) for each in value.args]
    match value:
        case sympy.Add() | sympy.Mul():
            return value.func(*sorted(args, key=str), evaluate=False)
        case sympy.Pow():
            return sympy.Pow(*args, evaluate=False)
        case sympy.Sum() | sympy.Product() | sympy.Integral() | sympy.Tuple() | sympy.Eq():
            return value.func(*args)
    return value


def digits_of(value: Any) -> float:
    """Return an upper bound of log10 |value| if it is a number, else 0, checking every node."""
    if not isinstance(value, sympy.Basic):
        return 0.0
    if isinstance(value, sympy.Rational):
        digits = (abs(value.p).bit_length() + 1) * 0.302
        _bound(max(digits, value.q.bit_length() * 0.302))
        return digits
    below = [digits_of(child) for child in value.args]
    if isinstance(value, sympy.Pow):
        base, exponent = value.args
        if (exponent.is_number and not exponent.is_Atom) or base.is_number:
            _bound_power(exponent, below)
        elif exponent.is_Integer and abs(int(exponent)) > 1000:
            raise TooLarge
        if not base.is_number:
            return 0.0
        fraction = _fraction_of(exponent)
        factor = 10.0 ** min(below[1], 5) if fraction is None else max(float(abs(fraction)), 1.0)
        return max(below[0], 0.5) * factor
    if isinstance(value, sympy.exp):
        _bound_power(value.args[0], [0.5, below[0]])
        return 10.0 ** min(below[0], 5)
    if isinstance(value, sympy.factorial | sympy.binomial | sympy.factorial2 | sympy.gamma):
        if below[0] > MAX_ARGUMENT_DIGITS:
            raise TooLarge
        return 4.0 * 10 ** below[0]
    if isinstance(value, sympy.Sum | sympy.Product | sympy.Integral):
        raise TooLarge
    total = sum(below) if isinstance(value, sympy.Mul) else max(below, default=0.5) + 1.0
    _bound(total)
    return total


def _bound_power(exponent: Any, below: list[float]) -> None:
    fraction = _fraction_of(exponent)
    if fraction is not None:
        _bound(max(below[0], 0.31) * max(float(abs(fraction)), 1.0))
        if fraction.denominator > 1000:
            raise TooLarge
    elif exponent.is_number:
        if below[1] > 5:
            raise TooLarge
        _bound(max(below[0], 0.31) * 10.0 ** min(below[1], 5) / 100)


def _fraction_of(value: Any) -> Fraction | None:
    """Return the value of a small sum, product or quotient of whole numbers, such as 1/3."""
    if value.is_Rational:
        return Fraction(int(value.p), int(value.q)) if abs(value) < 10**9 else None
    terms = [_fraction_of(each) for each in value.args]
    numbers = [term for term in terms if term is not None]
    if len(numbers) < len(terms) or len(terms) > 4:
        return None
    if value.is_Mul:
        return math.prod(numbers, start=Fraction(1))
    if value.is_Add:
        return sum(numbers, start=Fraction(0))
    if value.is_Pow and numbers[1] == -1 and numbers[0]:
        return 1 / numbers[0]
    return None


def _bound(digits: float) -> None:
    if not math.isfinite(digits) or digits > _MAX_DIGITS:
        raise TooLarge
