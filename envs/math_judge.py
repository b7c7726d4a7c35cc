"""The default judge of `grader_process`: compares an answer with the truth as mathematics.

An answer is read twice: as LaTeX by math-verify, and as Python or sympy by a walk over its syntax
tree, which never evaluates it. It is right if either reading is. Neither of math-verify's own time
limits is used: they raise from a signal handler, and such an exception can be swallowed by sympy's
`except Exception` blocks and delayed by long C calls.
"""

from __future__ import annotations

import ast
import functools
import math
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import sympy
from math_verify import parse, verify
from math_verify.parser import LatexExtractionConfig
from sympy.core.relational import Relational

_MAX_DIGITS = 5000  # of any number that an expression stands for
_MAX_NODES = 600
_MAX_DEPTH = 40
_PYTHON_MARKS = re.compile(
    r"\*|\d[eE][+-]?\d|[A-Za-z]\(|(?<![A-Za-z])(?:pi|oo|I|E)\b|^\[.*\]$|^\{.*\}$", re.DOTALL
)
_IMPLICIT = re.compile(r"(?<![A-Za-z_.0-9])(\d+(?:\.\d+)?) ?(?=[A-Za-z(])(?![eE][+-]?\d)")

_WARM_UP = (
    ("x^2+2x+1", "(x+1)^2"),
    ("2x", "x+1"),
    (r"\sin(2x)", r"2\sin x\cos x"),
    (r"\frac{x^2-1}{x+1}", "x-1"),
    (r"\frac{1}{\sqrt{n}}", r"\sqrt{\frac{1}{n}}"),
    (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"),
    ("2*pi/3", r"\frac{2\pi}{3}"),
    ("3+4i", "3+4*I"),
    (r"\{1,2\}", r"\{2,1\}"),
    ("(0,1]", "0<x<1"),
    ("(1,2)", "(1,3)"),
    ("x>1", r"(1,\infty)"),
    ("y=2x", "y=2*x"),
    ("x=1,y=2", "x=1, y=2"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", "Matrix([[1,2],[3,4]])"),
    (r"\ln 2+e^3", r"\log_2 3"),
    (r"\int_0^2 \cos(t^{t})^{\tan t} e^{t^3} dt", r"\sum_{k=1}^n \frac{1}{k^2}"),
    (r"\frac{5}{2+\frac{3}{1+\frac{1}{y}}}", r"\sqrt{3+\sqrt{5+\sqrt{7}}}"),
    (r"\left(\cos(x^3+\sin(x^2))\right)^{2}-\sin(\cos(x))", "((x+1)(x+2)(x+3))^2"),
)

Decimal = tuple[int, int, int]  # numerator, denominator, digits after the point


class _TooLarge(Exception):
    """An expression stands for a number of too many digits, or is itself too large."""


def judge(
    answer: str,
    truth: str,
    decimals: tuple[Decimal | None, Decimal | None] = (None, None),
    is_number: bool = False,
) -> bool | None:
    """Return whether the answer equals the truth; None if the truth cannot be read.

    Args:
        answer: Tidied text of the answer.
        truth: Tidied text of the truth.
        decimals: Answer and truth as decimals, where they are written so.
        is_number: Whether the truth is a number, which no sum or product is accepted for.
    """
    truths = _truths(truth)
    if not truths:
        return None
    return any(
        _is_right(expected, found, decimals, is_number)
        for found in _readings(answer)
        for expected in truths
    )


def warm_up() -> None:
    """Compare once what is usual, so that modules are imported and sympy has filled its caches."""
    for answer, truth in _WARM_UP:
        judge(answer, truth)


@functools.lru_cache(maxsize=256)
def _truths(truth: str) -> tuple[Any, ...]:
    """Read a truth, and evaluate it alone: what fails here is no fault of an answer."""
    found = []
    for expected in _readings(truth):
        try:
            _check_size(expected)
            if not _is_undefined(expected) and verify(
                expected, expected, timeout_seconds=None, raise_on_error=True
            ):
                found.append(expected)
        except _TooLarge:
            found.append(expected)
        except MemoryError:
            raise
        except Exception:  # sympy raises anything
            continue
    return tuple(found)


def _is_right(
    expected: Any, found: Any, decimals: tuple[Decimal | None, Decimal | None], is_number: bool
) -> bool:
    try:
        _check_size(found)
        _check_size(expected)
    except _TooLarge:
        return bool(expected == found)
    try:
        if is_number and _is_unevaluated(_right_side(found)):
            return False
        if _is_constant(expected) and not isinstance(found, sympy.Set | sympy.Tuple):
            value = _right_side(found)
            return _is_constant(value) and _same_constant(expected, value, decimals)
        if (
            isinstance(expected, sympy.FiniteSet | sympy.Tuple)
            and type(expected) is type(found)
            and all(map(_is_constant, (*expected.args, *found.args)))
        ):
            return _same_members(expected, found)
        if isinstance(expected, sympy.Interval) and isinstance(found, sympy.Interval):
            ends = (expected.start, found.start), (expected.end, found.end)
            if all(map(_is_constant, (*ends[0], *ends[1]))):
                return (
                    expected.left_open == found.left_open
                    and expected.right_open == found.right_open
                    and all(_same_constant(x, y, (None, None)) for x, y in ends)
                )
        if _is_refuted(expected, _right_side(found)):
            return False
        return verify(expected, found, timeout_seconds=None, raise_on_error=True)
    except MemoryError:
        raise
    except Exception:  # the truth has been evaluated before: the answer is at fault
        return False


def _is_refuted(expected: Any, found: Any) -> bool:
    """Whether two expressions have different values at a point; simplifying can take forever."""
    pair = expected, found
    if not all(isinstance(each, sympy.Expr) for each in pair):
        return False
    if all(each.is_Symbol or (each.is_Mul and all(map(_is_name, each.args))) for each in pair):
        return False  # a word, which was read as a product of letters
    symbols = sorted(expected.free_symbols | found.free_symbols, key=str)
    point = {symbol: sympy.Float(0.37 + 0.61 * k, 30) for k, symbol in enumerate(symbols)}
    x, y = (each.subs(point).evalf(20) for each in pair)
    if not (x.is_Number or x.is_complex) or not (y.is_Number or y.is_complex):
        return False
    return bool(abs(x - y) > 1e-6 * max(abs(x), abs(y)))


def _is_name(value: Any) -> bool:
    return value.is_Symbol or value == sympy.E


def _same_members(expected: Any, found: Any) -> bool:
    none = (None, None)
    if len(expected.args) != len(found.args):
        return False
    if isinstance(expected, sympy.Tuple):
        pairs = zip(expected.args, found.args, strict=True)
        return all(_same_constant(x, y, none) for x, y in pairs)
    rest = list(found.args)
    for x in expected.args:
        match = next((y for y in rest if _same_constant(x, y, none)), None)
        if match is None:
            return False
        rest.remove(match)
    return True


def _same_constant(
    expected: Any, found: Any, decimals: tuple[Decimal | None, Decimal | None]
) -> bool:
    """Compare two numbers relatively, exact ones to 30 digits; a decimal may be a rounding."""
    x, y = expected.doit(), found.doit()
    if _is_undefined(x) or _is_undefined(y):
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


def _is_constant(value: Any) -> bool:
    return isinstance(value, sympy.Expr) and value.is_number is True


def _is_undefined(value: Any) -> bool:
    return isinstance(value, sympy.Basic) and value.has(sympy.nan, sympy.zoo)


def _right_side(value: Any) -> Any:
    """Return what the last of a chain of equations ends with, as math-verify does."""
    while isinstance(value, sympy.And) and value.args:
        value = getattr(value, "_unsorted_args", value.args)[-1]
    return value.rhs if isinstance(value, sympy.Eq) else value


# ------------------------------------------------------------------------------------- bounds


def _check_size(value: Any) -> None:
    """Raise `_TooLarge` for an expression that would take long or much memory to evaluate."""
    stack, nodes = [(value, 0)], 0
    while stack:
        each, depth = stack.pop()
        nodes += 1
        if nodes > _MAX_NODES or depth > _MAX_DEPTH:
            raise _TooLarge
        if isinstance(each, sympy.Basic):
            stack += [(child, depth + 1) for child in each.args]
    _check_digits(value)


def _check_digits(value: Any) -> float:
    """Return an upper bound of log10 |value| if it is a number, else 0, checking every node."""
    if not isinstance(value, sympy.Basic):
        return 0.0
    if isinstance(value, sympy.Rational):
        digits = (abs(value.p).bit_length() + 1) * 0.302
        _bound(max(digits, value.q.bit_length() * 0.302))
        return digits
    below = [_check_digits(child) for child in value.args]
    if isinstance(value, sympy.Pow):
        base, exponent = value.args
        if (exponent.is_number and not exponent.is_Atom) or base.is_number:
            _bound_power(base, exponent, below)
        elif exponent.is_Integer and abs(int(exponent)) > 1000:
            raise _TooLarge
        return 0.0 if not base.is_number else _power_digits(base, exponent, below)
    if isinstance(value, sympy.exp):
        _bound_power(sympy.E, value.args[0], [0.5, below[0]])
        return 10.0 ** min(below[0], 5)
    if isinstance(value, sympy.factorial | sympy.binomial | sympy.factorial2 | sympy.gamma):
        if below[0] > 3.7:
            raise _TooLarge
        return 4.0 * 10 ** below[0]
    if isinstance(value, sympy.Sum | sympy.Product | sympy.Integral):
        raise _TooLarge
    total = sum(below) if isinstance(value, sympy.Mul) else max(below, default=0.5) + 1.0
    _bound(total)
    return total


def _power_digits(base: Any, exponent: Any, below: list[float]) -> float:
    return max(below[0], 0.5) * 10.0 ** min(below[1], 5)


def _bound_power(base: Any, exponent: Any, below: list[float]) -> None:
    if exponent.is_Rational:
        _bound(max(below[0], 0.31) * max(abs(exponent.p) / exponent.q, 1.0))
        if exponent.q > 1000:
            raise _TooLarge
    elif exponent.is_number:
        if below[1] > 5:
            raise _TooLarge
        _bound(max(below[0], 0.31) * 10.0 ** min(below[1], 5) / 100)


def _bound(digits: float) -> None:
    if not math.isfinite(digits) or digits > _MAX_DIGITS:
        raise _TooLarge


def _is_unevaluated(value: Any) -> bool:
    """Whether an expression contains a sum, product or quotient of numbers yet to be worked out.

    A fraction, a power of ten, and a factor before a root or a constant are worked out.
    """
    if not isinstance(value, sympy.Expr):
        return False
    if isinstance(value, sympy.Add):
        return sum(1 for each in value.args if each.is_number) > 1
    if isinstance(value, sympy.Mul):
        factors = [each for each in value.args if each not in (1, -1)]
        plain = [each for each in factors if _is_plain(each)]
        below = [each for each in factors if _is_reciprocal(each)]
        if any(not each.args[0].is_Integer for each in below):
            return True
        if len(plain) > 1 or len(below) > 1 or (below and plain and not plain[0].is_Integer):
            return True
    return any(map(_is_unevaluated, value.args))


def _is_plain(value: Any) -> bool:
    """Whether a factor is a number or a power of one, other than a power of ten."""
    if isinstance(value, sympy.Pow):
        return value.base.is_Integer and value.base != 10 and value.exp.is_Integer and value.exp > 0
    return bool(value.is_Number)


def _is_reciprocal(value: Any) -> bool:
    return isinstance(value, sympy.Pow) and value.exp == -1 and value.base.is_number is True


# ----------------------------------------------------------------------------------- readings


def _readings(text: str) -> Iterator[Any]:
    yield from _as_latex(text)
    if "\\" not in text and _PYTHON_MARKS.search(text):
        # LaTeX's reading of 3i has a symbol in it, unless the text looks complex in other ways.
        for imaginary in (sympy.I, sympy.Symbol("i", real=True))[: 1 + ("I" in text)]:
            found = _as_python(text, imaginary)
            if found is not None:
                yield found


def _as_latex(text: str) -> list[Any]:
    # Inside a box the whole text counts as the expression: nothing is searched for in it.
    return parse(
        f"\\boxed{{{text}}}",
        extraction_config=(LatexExtractionConfig(boxed_match_priority=0),),
        fallback_mode="no_fallback",
        extraction_mode="first_match",
        parsing_timeout=None,  # pyright: ignore[reportArgumentType]
    )


_CONSTANTS = {
    "pi": sympy.pi,
    "E": sympy.E,
    "e": sympy.E,
    "oo": sympy.oo,
    "inf": sympy.oo,
}
_FUNCTIONS = {
    **{
        name: getattr(sympy, name)
        for name in [
            "sqrt",
            "cbrt",
            "exp",
            "log",
            "sin",
            "cos",
            "tan",
            "cot",
            "sec",
            "csc",
            "asin",
            "acos",
            "atan",
            "sinh",
            "cosh",
            "tanh",
            "Abs",
            "factorial",
            "binomial",
            "floor",
            "ceiling",
            "re",
            "im",
            "conjugate",
            "sign",
            "Max",
            "Min",
        ]
    },
    "ln": sympy.log,
    "abs": sympy.Abs,
    "Rational": lambda p, q=1: sympy.Mul(p, sympy.Pow(q, -1, evaluate=False), evaluate=False),
    "Fraction": lambda p, q=1: sympy.Mul(p, sympy.Pow(q, -1, evaluate=False), evaluate=False),
    "Integer": lambda value: value,
    "Float": lambda value: value,
}
_OPERATORS: dict[type[Any], Any] = {
    ast.Add: lambda x, y: sympy.Add(x, y, evaluate=False),
    ast.Sub: lambda x, y: sympy.Add(x, _negative(y), evaluate=False),
    ast.Mult: lambda x, y: sympy.Mul(x, y, evaluate=False),
    ast.Div: lambda x, y: sympy.Mul(x, sympy.Pow(y, -1, evaluate=False), evaluate=False),
    ast.Pow: lambda x, y: sympy.Pow(x, y, evaluate=False),
    ast.BitXor: lambda x, y: sympy.Pow(x, y, evaluate=False),
}
_RELATIONS: dict[type[Any], type[Relational]] = {
    ast.Lt: sympy.StrictLessThan,
    ast.LtE: sympy.LessThan,
    ast.Gt: sympy.StrictGreaterThan,
    ast.GtE: sympy.GreaterThan,
    ast.Eq: sympy.Eq,
}


def _as_python(text: str, imaginary: Any) -> Any:
    """Read what Python or sympy prints, e.g. `x**2 + sqrt(2)`; None if it is something else."""
    try:
        tree = ast.parse(_IMPLICIT.sub(r"\1*", text.strip()), mode="eval").body
        return _walk(tree, 0, imaginary)
    except MemoryError:
        return None  # of the parser: nested too deeply
    except Exception:
        return None


def _negative(value: Any) -> Any:
    return -value if value.is_Number else sympy.Mul(-1, value, evaluate=False)


def _walk(node: ast.expr, depth: int, imaginary: Any) -> Any:
    if depth > _MAX_DEPTH:
        raise _TooLarge
    below = functools.partial(_walk, depth=depth + 1, imaginary=imaginary)
    match node:
        case ast.Constant(value=bool() | str() | bytes() | None):
            raise ValueError("not a number")
        case ast.Constant(value=int(value)):
            return sympy.Integer(value)
        case ast.Constant(value=float(value)):
            return sympy.Float(repr(value))
        case ast.Name(id=name):
            if name in ("I", "i"):
                return imaginary
            if name in _CONSTANTS:
                return _CONSTANTS[name]
            return sympy.Symbol(name.lower() if len(name) == 1 else name, real=True)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return _negative(below(operand))
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return below(operand)
        case ast.BinOp(left=left, op=operator, right=right):
            return _OPERATORS[type(operator)](below(left), below(right))
        case ast.Compare(left=left, ops=[operator], comparators=[right]):
            return _RELATIONS[type(operator)](below(left), below(right), evaluate=False)
        case ast.Tuple(elts=items):
            return sympy.Tuple(*map(below, items))
        case ast.List(elts=items) | ast.Set(elts=items):
            if items and isinstance(items[0], ast.List):
                return sympy.Matrix([[below(each) for each in row.elts] for row in items])  # type: ignore[attr-defined]
            return sympy.FiniteSet(*map(below, items))
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
            return _call(name, arguments, below)
        case _:
            raise ValueError("not an expression of numbers and symbols")


def _call(name: str, arguments: list[ast.expr], below: Any) -> Any:
    if name in ("Matrix", "FiniteSet", "set", "Tuple"):
        if name in ("Matrix", "set"):
            (argument,) = arguments
            if name == "Matrix" and isinstance(argument, ast.List):
                rows = [row.elts if isinstance(row, ast.List) else [row] for row in argument.elts]
                return sympy.Matrix([[below(each) for each in row] for row in rows])
            return below(argument)
        kind = sympy.FiniteSet if name == "FiniteSet" else sympy.Tuple
        return kind(*map(below, arguments))
    values = [below(each) for each in arguments]
    for value in values:
        _check_size(value)  # a function evaluates itself
    if name in ("factorial", "binomial") and any(abs(_check_digits(each)) > 3.7 for each in values):
        raise _TooLarge
    return _FUNCTIONS[name](*values)
