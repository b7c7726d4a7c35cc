r"""Reads the text of an answer as mathematics: as LaTeX, and as what Python or sympy prints.

LaTeX is read by math-verify; Python by a walk over its syntax tree, which never evaluates it.
Neither of math-verify's own time limits is used: they raise from a signal handler, and such an
exception can be swallowed by sympy's `except Exception` blocks and delayed by long C calls.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import sympy
from math_verify import parse
from math_verify.parser import LatexExtractionConfig
from sympy.core.relational import Relational

from tir_alp.tools.math_size import MAX_ARGUMENT_DIGITS, MAX_DEPTH, TooLarge, check_size, digits_of

_PYTHON_MARKS = re.compile(
    r"\*|\d[eE][+-]?\d|\d[jJ]\b|[A-Za-z]\(|(?<![A-Za-z])(?:pi|oo|I|E|EmptySet|GoldenRatio)\b"
    r"|^\[.*\]$|^\{.*\}$|[<>]",
    re.DOTALL,
)
_IMPLICIT = re.compile(r"(?<![A-Za-z_.0-9])(\d+(?:\.\d+)?) ?(?=[A-Za-z(])(?![eE][+-]?\d|[jJ]\b)")
_AND = re.compile(r"\band\b")
_CONFIG = LatexExtractionConfig(
    boxed_match_priority=0,
    # Units are removed before, and only after numbers: math-verify takes 2ab for 2 ab.
    normalization_config=dataclasses.replace(
        LatexExtractionConfig().normalization_config, units=False
    ),
)
_INDICES = frozenset("jkmn")


def readings(text: str) -> Iterator[Any]:
    """Yield what a tidied text may mean, unevaluated: first as LaTeX, then as Python."""
    yield from _as_latex(text)
    if "\\" not in text and _PYTHON_MARKS.search(text):
        found = _as_python(text), _as_interval(text)
        yield from (each for each in found if each is not None)


def with_imaginary(value: Any) -> Any:
    """Replace the symbol i by the imaginary unit, unless it looks like an index. May evaluate."""
    if not isinstance(value, sympy.Basic | sympy.MatrixBase):
        return value
    named = {each for each in value.free_symbols if str(each) == "i"}
    if not named or value.has(sympy.Sum, sympy.Product, sympy.Limit, sympy.Integral):
        return value
    is_index = any(str(each) in _INDICES for each in value.free_symbols)
    unit = sympy.Symbol("i", real=True) if is_index else sympy.I
    return value.xreplace(dict.fromkeys(named, unit))


def _as_latex(text: str) -> list[Any]:
    # Inside a box the whole text counts as the expression: nothing is searched for in it.
    found = parse(
        f"\\boxed{{{text}}}",
        extraction_config=(_CONFIG,),
        fallback_mode="no_fallback",
        extraction_mode="first_match",
        parsing_timeout=None,  # pyright: ignore[reportArgumentType]
    )
    if _AND.search(text):
        return [_intersection(each) for each in found]
    return found


def _both(*relations: Any) -> Any:
    return sympy.And(*relations, evaluate=False)  # pyright: ignore[reportCallIssue]


def _intersection(value: Any) -> Any:
    """Read "x>1 and x<3", which math-verify has as a set, as both at once."""
    if isinstance(value, sympy.FiniteSet) and all(
        isinstance(each, Relational) and not isinstance(each, sympy.Eq) for each in value.args
    ):
        return _both(*value.args)
    return value


_CONSTANTS = {
    "pi": sympy.pi,
    "I": sympy.I,
    "E": sympy.E,
    "e": sympy.E,
    "oo": sympy.oo,
    "inf": sympy.oo,
    "EmptySet": sympy.S.EmptySet,
    "GoldenRatio": sympy.GoldenRatio,
}
_MODULES = frozenset(("math", "cmath", "np", "numpy", "sp", "sympy", "fractions", "decimal"))
"""Names of modules that may stand before a name, with a dot."""
_WRITTEN = re.compile(r"\s*(-?\d{1,400})(?:/(\d{1,400})|(\.\d{1,400}))?\s*")
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
    "S": lambda value: value,
    "root": lambda x, n=2: sympy.Pow(x, sympy.Pow(n, -1)),
    "Eq": lambda x, y: sympy.Eq(x, y, evaluate=False),
}
_OF_TEXT = frozenset(("Decimal", "Fraction", "Rational", "Float", "Integer", "S"))
_OPERATORS: dict[type[Any], Any] = {
    ast.Add: lambda x, y: sympy.Add(x, y, evaluate=False),
    ast.Sub: lambda x, y: sympy.Add(x, _negative(y), evaluate=False),
    ast.Mult: lambda x, y: sympy.Mul(x, y, evaluate=False),
    ast.Div: lambda x, y: sympy.Mul(x, sympy.Pow(y, -1, evaluate=False), evaluate=False),
    ast.Pow: lambda x, y: sympy.Pow(x, y, evaluate=False),
    ast.BitXor: lambda x, y: sympy.Pow(x, y, evaluate=False),
}
_OPEN_ENDS = {"open": (True, True), "Lopen": (True, False), "Ropen": (False, True)}
_SETS: dict[str, Any] = {
    "FiniteSet": sympy.FiniteSet,
    "set": sympy.FiniteSet,  # without its braces, which mean nothing in LaTeX
    "frozenset": sympy.FiniteSet,
    "Tuple": sympy.Tuple,
    "Union": sympy.Union,
    "Interval": sympy.Interval,
}
_RELATIONS: dict[type[Any], type[Relational]] = {
    ast.Lt: sympy.StrictLessThan,
    ast.LtE: sympy.LessThan,
    ast.Gt: sympy.StrictGreaterThan,
    ast.GtE: sympy.GreaterThan,
    ast.Eq: sympy.Eq,
    ast.NotEq: sympy.Ne,
}


def _as_python(text: str) -> Any:
    """Read what Python or sympy prints, e.g. `x**2 + sqrt(2)`; None if it is something else."""
    try:
        tree = ast.parse(_IMPLICIT.sub(r"\1*", text.strip()), mode="eval").body
        return _walk(tree, 0)
    except MemoryError:
        return None  # of the parser: nested too deeply
    except Exception:
        return None


def _as_interval(text: str) -> Any:
    """Read `[0, pi/2)`, whose ends are as Python has them; None if it is something else."""
    ends = _as_python(f"({text[1:-1]})") if text[0] in "[(" and text[-1] in "])" else None
    if not isinstance(ends, sympy.Tuple) or len(ends) != 2:
        return None
    low, high = tuple[Any, Any](ends.args)
    try:
        check_size(ends)
    except TooLarge:
        return None
    if not all(each.is_extended_real and each.is_number for each in ends) or not low < high:
        return None
    return sympy.Interval(low, high, text[0] == "(", text[-1] == ")")


def _negative(value: Any) -> Any:
    return -value if value.is_Number else sympy.Mul(-1, value, evaluate=False)


def _walk(node: ast.expr, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise TooLarge

    def below(each: ast.expr) -> Any:
        return _walk(each, depth + 1)

    match node:
        case ast.Constant(value=bool() | str() | bytes() | None):
            raise ValueError("not a number")
        case ast.Constant(value=int(value)):
            return sympy.Integer(value)
        case ast.Constant(value=float(value)):
            return sympy.Float(repr(value))
        case ast.Constant(value=complex(real=0, imag=number)):
            whole = sympy.Integer(int(number)) if number.is_integer() else sympy.Float(repr(number))
            return sympy.Mul(whole, sympy.I, evaluate=False)
        case ast.Attribute(value=ast.Name(id=module), attr=name) if module in _MODULES:
            return below(ast.Name(name))
        case ast.Name(id=name):
            if name in _CONSTANTS:
                return _CONSTANTS[name]
            return sympy.Symbol(name.lower() if len(name) == 1 else name, real=True)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return _negative(below(operand))
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return below(operand)
        case ast.BinOp(left=left, op=operator, right=right):
            return _OPERATORS[type(operator)](below(left), below(right))
        case ast.Compare(left=left, ops=operators, comparators=others):
            terms = [below(each) for each in (left, *others)]
            relations = [
                _RELATIONS[type(operator)](x, y, evaluate=False)
                for operator, x, y in zip(operators, terms, terms[1:], strict=False)
            ]
            return relations[0] if len(relations) == 1 else _both(*relations)
        case ast.Tuple(elts=items):
            return sympy.Tuple(*map(below, items))
        case ast.List(elts=items) | ast.Set(elts=items):
            if items and isinstance(items[0], ast.List):
                return sympy.Matrix([[below(each) for each in row.elts] for row in items])  # type: ignore[attr-defined]
            members = [below(each) for each in items]
            check_size(sympy.Tuple(*members))
            return sympy.FiniteSet(*members)
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
            return _call(name, arguments, below)
        case ast.Call(
            func=ast.Attribute(value=ast.Name(id=module), attr=name), args=arguments, keywords=[]
        ) if module in _MODULES:
            return _call(name, arguments, below)
        case ast.Call(
            func=ast.Attribute(value=ast.Name(id="Interval"), attr=name),
            args=[_, _] as arguments,
            keywords=[],
        ):
            low, high = map(below, arguments)
            check_size(sympy.Tuple(low, high))
            return sympy.Interval(low, high, *_OPEN_ENDS[name])
        case _:
            raise ValueError("not an expression of numbers and symbols")


def _call(name: str, arguments: list[ast.expr], below: Any) -> Any:
    if name in ("set", "frozenset", "EmptySet") and not arguments:
        return sympy.S.EmptySet
    if name == "array" and isinstance(arguments[0], ast.List):
        is_flat = not any(isinstance(each, ast.List) for each in arguments[0].elts)
        if is_flat:
            return sympy.Tuple(*map(below, arguments[0].elts))
        name = "Matrix"
    match arguments:
        case [ast.Constant(value=str(text))] if name in _OF_TEXT:
            return _written(text)
    if name == "Matrix" or (name in ("set", "frozenset") and len(arguments) == 1):
        (argument,) = arguments
        if name == "Matrix" and isinstance(argument, ast.List):
            rows = [row.elts if isinstance(row, ast.List) else [row] for row in argument.elts]
            return sympy.Matrix([[below(each) for each in row] for row in rows])
        return below(argument)
    values = [below(each) for each in arguments]
    for value in values:
        check_size(value)  # a function evaluates itself, and a set compares its members
    if name in _SETS:
        return _SETS[name](*values)
    if name in ("factorial", "binomial") and any(
        abs(digits_of(each)) > MAX_ARGUMENT_DIGITS for each in values
    ):
        raise TooLarge
    return _FUNCTIONS[name](*values)


def _written(text: str) -> Any:
    """Read the number in a text, as in `Decimal('0.5')` and `Rational('1/3')`."""
    match = _WRITTEN.fullmatch(text)
    if match is None:
        raise ValueError("not a number")
    whole, under, rest = match.groups()
    if rest is not None:
        return sympy.Float(whole + rest)
    value = sympy.Integer(int(whole))
    if under is None:
        return value
    return sympy.Mul(
        value, sympy.Pow(sympy.Integer(int(under)), -1, evaluate=False), evaluate=False
    )
