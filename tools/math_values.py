"""Compares values of mathematics that have been read: numbers, sets, functions of symbols.

Exact numbers are compared to 30 digits. Functions are compared at points, which takes less than
simplifying them: that can take forever. What is not decided here is left to math-verify.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import sympy
from sympy.core.relational import Relational

Decimal = tuple[int, int, int]  # numerator, denominator, digits after the point
NO_DECIMALS: tuple[Decimal | None, Decimal | None] = (None, None)


def is_constant(value: Any) -> bool:
    """Whether a value is a number."""
    return isinstance(value, sympy.Expr) and value.is_number is True


def is_undefined(value: Any) -> bool:
    """Whether a value contains a division by zero."""
    return isinstance(value, sympy.Basic) and value.has(sympy.nan, sympy.zoo)


def same_constant(
    expected: Any, found: Any, decimals: tuple[Decimal | None, Decimal | None] = NO_DECIMALS
) -> bool:
    """Compare two numbers relatively, exact ones to 30 digits; a decimal may be a rounding."""
    x, y = expected.doit(), found.doit()
    if is_undefined(x) or is_undefined(y):
        return False
    if x.is_Rational and y.is_Rational:
        return bool(x == y)
    if x.is_infinite or y.is_infinite:
        return bool(x == y)
    for decimal, exact in zip(decimals, (x, y), strict=True):
        if decimal is not None and not exact.has(sympy.Float):
            return _is_cut(decimal, exact)
    a, b = x.evalf(50), y.evalf(50)
    largest = max(abs(a), abs(b))
    if x.has(sympy.Float) or y.has(sympy.Float):
        return bool(abs(a - b) <= largest * sympy.Rational(1, 10**6))
    if min(abs(a), abs(b)) < sympy.Rational(1, 10**40) * max(1, largest):
        return bool(sympy.simplify(x - y) == 0)
    return bool(abs(a - b) <= largest * sympy.Rational(1, 10**30))


def _is_cut(decimal: Decimal, exact: Any) -> bool:
    numerator, denominator, places = decimal
    value, unit = Fraction(numerator, denominator), Fraction(10) ** -places
    near = exact.evalf(50)
    if not near.is_real:
        return False
    distance = abs(near - sympy.Rational(numerator, denominator))
    if distance <= abs(near) * sympy.Rational(1, 10**15):
        return True
    return abs(value) >= 10**5 * unit and bool(
        distance < sympy.Rational(unit.numerator, unit.denominator)
    )


# ------------------------------------------------------------------------------ several numbers


def same_members(expected: Sequence[Any], found: Sequence[Any], *, in_order: bool) -> bool:
    """Compare numbers one by one; where a plain number is expected, it has to be worked out."""
    if len(expected) != len(found):
        return False
    if in_order:
        return all(map(_same_member, expected, found))
    rest = list(found)
    for x in expected:
        match = next((y for y in rest if _same_member(x, y)), None)
        if match is None:
            return False
        rest.remove(match)
    return True


def _same_member(expected: Any, found: Any) -> bool:
    if is_unworked(found) and not is_unworked(expected) and _is_rational(expected):
        return False
    return same_constant(expected, found)


def _is_rational(value: Any) -> bool:
    return value.is_rational is True and not value.has(sympy.Function)


@dataclass(frozen=True, slots=True)
class Piece:
    """An interval of real numbers, or a single one."""

    low: Any
    high: Any
    is_left_open: bool
    is_right_open: bool


@dataclass(frozen=True, slots=True)
class Region:
    """A set of real numbers, and the symbol that an inequality names it by."""

    pieces: tuple[Piece, ...]
    symbol: Any = None


_EVERYTHING = Piece(-sympy.oo, sympy.oo, True, True)


def region_of(value: Any) -> Region | None:
    """Read an interval, a union, or inequalities that bound one symbol, as a set of numbers."""
    if isinstance(value, sympy.Interval):
        if not (is_constant(value.start) and is_constant(value.end)):
            return None
        flags = bool(value.left_open), bool(value.right_open)
        return Region((Piece(value.start, value.end, *flags),))
    if isinstance(value, sympy.Union):
        return _union(value.args)
    if isinstance(value, sympy.Eq):
        if value.lhs.is_Symbol and isinstance(value.rhs, sympy.Interval | sympy.Union):
            region = region_of(value.rhs)
            return region and Region(region.pieces, value.lhs)
        return None
    if isinstance(value, Relational):
        return _half_line(value)
    if isinstance(value, sympy.And):
        return _intersection(value.args)
    if isinstance(value, sympy.Or):
        return _union(value.args)
    if isinstance(value, sympy.FiniteSet) and value.args:
        is_inequalities = all(isinstance(each, Relational | sympy.And) for each in value.args)
        return _union(value.args) if is_inequalities else None
    return None


def _half_line(relation: Any) -> Region | None:
    if relation.rhs.is_Symbol and is_constant(relation.lhs):
        relation = relation.reversed
    symbol, end = relation.args
    if not symbol.is_Symbol or not is_constant(end):
        return None
    match relation:
        case sympy.StrictLessThan() | sympy.LessThan():
            pieces = (Piece(-sympy.oo, end, True, isinstance(relation, sympy.StrictLessThan)),)
        case sympy.StrictGreaterThan() | sympy.GreaterThan():
            pieces = (Piece(end, sympy.oo, isinstance(relation, sympy.StrictGreaterThan), True),)
        case sympy.Ne():
            pieces = (Piece(-sympy.oo, end, True, True), Piece(end, sympy.oo, True, True))
        case _:
            return None
    return Region(pieces, symbol)


def _intersection(relations: Sequence[Any]) -> Region | None:
    regions = [region_of(each) for each in relations]
    result, symbols = _EVERYTHING, set()
    for region in regions:
        if region is None or len(region.pieces) != 1:
            return None
        (piece,) = region.pieces
        symbols.add(region.symbol)
        if piece.low != -sympy.oo:
            if result.low != -sympy.oo:
                return None
            result = Piece(piece.low, result.high, piece.is_left_open, result.is_right_open)
        if piece.high != sympy.oo:
            if result.high != sympy.oo:
                return None
            result = Piece(result.low, piece.high, result.is_left_open, piece.is_right_open)
    if len(symbols) != 1 or None in symbols:
        return None
    return Region((result,), symbols.pop())


def _union(parts: Sequence[Any]) -> Region | None:
    regions = [_points_of(each) or region_of(each) for each in parts]
    found = [region for region in regions if region is not None]
    symbols = {region.symbol for region in found}
    if len(found) < len(parts) or len(symbols) != 1:
        return None
    pieces = itertools.chain.from_iterable(region.pieces for region in found)
    return Region(tuple(sorted(pieces, key=lambda piece: float(piece.low))), symbols.pop())


def _points_of(value: Any) -> Region | None:
    if isinstance(value, sympy.FiniteSet) and value.args and all(map(is_constant, value.args)):
        return Region(tuple(Piece(each, each, False, False) for each in value.args))
    return None


def same_region(expected: Region, found: Region) -> bool:
    """Whether two sets of numbers are the same, and named by the same symbol if both are."""
    symbols = {region.symbol for region in (expected, found) if region.symbol is not None}
    return (
        len(symbols) < 2
        and len(expected.pieces) == len(found.pieces)
        and all(
            (x.is_left_open, x.is_right_open) == (y.is_left_open, y.is_right_open)
            and _same_member(x.low, y.low)
            and _same_member(x.high, y.high)
            for x, y in zip(expected.pieces, found.pieces, strict=True)
        )
    )


# ---------------------------------------------------------------------------------- functions

_SMOOTH = (
    *(sympy.exp, sympy.log, sympy.sin, sympy.cos, sympy.tan, sympy.cot, sympy.sec, sympy.csc),
    *(sympy.sinh, sympy.cosh, sympy.tanh, sympy.atan),
)
_MAX_SYMBOLS = 6
_MOST_DIGITS = 15  # of a number, and of a ratio of numbers, that points can tell apart


def same_function(expected: Any, found: Any) -> bool | None:
    """Whether two expressions are equal wherever both are real; None if points cannot tell.

    A difference at one point refutes. Equality at all points confirms for functions that cannot
    change their form between the points: no absolute values, no roots of sums.
    """
    symbols = sorted(expected.free_symbols | found.free_symbols, key=str)
    if len(symbols) > _MAX_SYMBOLS:
        return None
    has_decimals = expected.has(sympy.Float) or found.has(sympy.Float)
    tolerance = sympy.Rational(1, 10**6 if has_decimals else 10**30)
    num_agreed = 0
    for point in _points(symbols, expected, found):
        x, y = (_real(each.evalf(50, subs=point)) for each in (expected, found))
        if not (_is_defined(x) and _is_defined(y)):
            continue
        if not (x.is_real and y.is_real):
            if x.is_real is not y.is_real:
                return False
            continue
        if abs(x - y) > tolerance * max(abs(x), abs(y)):
            return False
        num_agreed += 1
    if num_agreed < 2 or has_decimals or not (_is_smooth(expected) and _is_smooth(found)):
        return None
    return True


def _points(symbols: list[Any], *values: Any) -> Iterator[dict[Any, Any]]:
    signs = list(itertools.islice(itertools.product((1, -1), repeat=len(symbols)), 8))
    for scale, step in ((sympy.Rational(37, 91), 61), (sympy.Rational(233, 97), 89)):
        for pattern in signs:
            yield {
                symbol: sign * (scale + sympy.Rational(k * step, 100))
                for k, (symbol, sign) in enumerate(zip(symbols, pattern, strict=True))
            }


def _real(value: Any) -> Any:
    """Remove an imaginary part that is only rounding."""
    real, imaginary = value.as_real_imag()
    return real if abs(imaginary) < abs(real) * sympy.Rational(1, 10**40) else value


def _is_defined(value: Any) -> bool:
    return bool(value.is_Number or value.is_complex) and value.is_finite is True


def _is_smooth(value: Any) -> bool:
    for each in sympy.preorder_traversal(value):
        if isinstance(each, sympy.Function) and not isinstance(each, _SMOOTH):
            return False
        if isinstance(each, sympy.log) and not _is_monomial(each.args[0]):
            return False
        if isinstance(each, sympy.Rational) and each and _is_extreme(each):
            return False
        if isinstance(each, sympy.Pow):
            if each.exp.is_Rational and abs(each.exp) > 2 * _MOST_DIGITS:
                return False
            if not each.exp.is_Integer and not (_is_monomial(each.base) or each.base == sympy.E):
                return False
        if not isinstance(each, sympy.Expr):
            return False
    return True


def _is_extreme(number: Any) -> bool:
    return bool(max(abs(number), 1 / abs(number)) > 10**_MOST_DIGITS)


def _is_monomial(value: Any) -> bool:
    """Whether a value is a product of powers of symbols and numbers."""
    if isinstance(value, sympy.Mul):
        return all(map(_is_monomial, value.args))
    if isinstance(value, sympy.Pow):
        return _is_monomial(value.base) and value.exp.is_Rational is True
    return bool(value.is_Symbol or value.is_Number)


# ------------------------------------------------------------------------------- worked out


def is_unworked(value: Any) -> bool:
    """Whether an expression contains arithmetic with plain numbers that is yet to be worked out.

    That is a sum, product or quotient, a power with a whole exponent, a factorial or a binomial
    coefficient. A fraction, a power of ten, a root, and a factor before a root or a constant are
    worked out.
    """
    if not isinstance(value, sympy.Expr):
        return False
    if isinstance(value, sympy.factorial | sympy.binomial | sympy.factorial2):
        return all(each.is_number for each in value.args)
    if isinstance(value, sympy.Add):
        numbers = [each for each in value.args if each.is_number]
        if len(numbers) > 1:
            return not (len(numbers) == len(value.args) == 2 and _is_mixed(*numbers))
    elif isinstance(value, sympy.Mul):
        factors = [each for each in value.args if each not in (1, -1)]
        plain = [each for each in factors if each.is_Number or _is_whole_power(each)]
        below = [each for each in factors if _is_reciprocal(each)]
        if any(not each.args[0].is_Integer for each in below):
            return True
        if len(plain) > 1 or len(below) > 1 or (below and plain and not plain[0].is_Integer):
            return True
        return any(is_unworked(each) for each in factors if not _is_reciprocal(each))
    elif _is_whole_power(value) or _is_reciprocal(value):
        return True
    return any(map(is_unworked, value.args))


def _is_mixed(one: Any, other: Any) -> bool:
    """Whether a sum is that of a mixed number, which is read as 3 + 1/2."""
    whole, part = (one, other) if one.is_Integer else (other, one)
    if not whole.is_Integer or not part.is_Mul or is_unworked(part):
        return False
    return bool(0 < part < 1 and whole > 0) or bool(-1 < part < 0 and whole < 0)


def _is_whole_power(value: Any) -> bool:
    """Whether a value is a number to a whole power, other than a power of ten."""
    if not isinstance(value, sympy.Pow) or not value.exp.is_Integer or value.exp == -1:
        return False
    base = value.base
    if str(base) == "i":
        return True
    return is_constant(base) and base not in (10, sympy.E, sympy.pi)


def _is_reciprocal(value: Any) -> bool:
    return isinstance(value, sympy.Pow) and value.exp == -1 and value.base.is_number is True
