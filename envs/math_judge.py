"""The default judge of `grader_process`: compares an answer with the truth as mathematics.

An answer is right if one of its readings is. What `tools.math_values` cannot decide is decided by
math-verify.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import sympy
from math_verify import verify

from tir_alp.tools.math_size import TooLarge, check_size, in_one_order
from tir_alp.tools.math_text import readings, with_imaginary
from tir_alp.tools.math_values import (
    NO_DECIMALS,
    Decimal,
    is_constant,
    is_undefined,
    is_unworked,
    region_of,
    same_constant,
    same_function,
    same_members,
    same_region,
)

_EVALUATED_WHEN_READ = re.compile(r"!|\\d?t?binom|\\choose|factorial|binomial|comb\(")
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
    (r"|x-\sqrt{(x-5)^2}|", "(x-5)^2"),
    (r"\int_0^2 \cos(t^{t})^{\tan t} e^{t^3} dt", r"\sum_{k=1}^n \frac{1}{k^2}"),
    (r"\frac{5}{2+\frac{3}{1+\frac{1}{y}}}", r"\sqrt{3+\sqrt{5+\sqrt{7}}}"),
    (r"\left(\cos(x^3+\sin(x^2))\right)^{2}-\sin(\cos(x))", "((x+1)(x+2)(x+3))^2"),
)


def warm_up() -> None:
    """Compare once what is usual, so that modules are imported and sympy has filled its caches."""
    for answer, truth in _WARM_UP:
        judge(answer, truth)


def judge(
    answer: str,
    truth: str,
    decimals: tuple[Decimal | None, Decimal | None] = NO_DECIMALS,
    is_number: bool = False,
) -> bool | None:
    """Return whether the answer equals the truth; None if the truth cannot be read.

    Args:
        answer: Tidied text of the answer.
        truth: Tidied text of the truth.
        decimals: Answer and truth as decimals, where they are written so.
        is_number: Whether the truth is a plain number, for which arithmetic is no answer.
    """
    truths = _truths(truth)
    if not truths:
        return None
    if is_number and _EVALUATED_WHEN_READ.search(answer):
        return False
    return any(
        _is_right(expected, found, decimals, is_number)
        for found in readings(answer)
        for expected in truths
    )


@functools.lru_cache(maxsize=256)
def _truths(truth: str) -> tuple[Any, ...]:
    """Read a truth, and evaluate it alone: what fails here is no fault of an answer."""
    found = []
    for expected in readings(truth):
        if isinstance(expected, sympy.FiniteSet) and _has_interval(found):
            continue  # [-1, 1] is a list only if it cannot be an interval
        try:
            check_size(expected)
            if not is_undefined(expected) and verify(
                expected, expected, timeout_seconds=None, raise_on_error=True
            ):
                found.append(expected)
        except TooLarge:
            found.append(expected)
        except MemoryError:
            raise
        except Exception:  # sympy raises anything
            continue
    return tuple(found)


def _has_interval(found: list[Any]) -> bool:
    return any(isinstance(each, sympy.Interval) for each in found)


def _is_right(
    expected: Any, found: Any, decimals: tuple[Decimal | None, Decimal | None], is_number: bool
) -> bool:
    try:
        check_size(found)
        check_size(expected)
    except TooLarge:
        return in_one_order(expected) == in_one_order(found)
    try:
        if is_number and is_unworked(_right_side(found)):
            return False
        expected, found = with_imaginary(expected), with_imaginary(found)
        verdict = _compare(expected, found, decimals)
        if verdict is None:
            return verify(expected, found, timeout_seconds=None, raise_on_error=True)
        return verdict
    except MemoryError:
        raise
    except Exception:  # the truth has been evaluated before: the answer is at fault
        return False


def _compare(
    expected: Any, found: Any, decimals: tuple[Decimal | None, Decimal | None]
) -> bool | None:
    """Compare two values as far as that is possible without simplifying; None if it is not."""
    value = _right_side(found)
    if is_constant(expected) and not isinstance(found, sympy.Set | sympy.Tuple):
        return is_constant(value) and same_constant(expected, value, decimals)
    if (
        isinstance(expected, sympy.FiniteSet | sympy.Tuple)
        and type(expected) is type(found)
        and all(map(is_constant, (*expected.args, *found.args)))
    ):
        in_order = isinstance(expected, sympy.Tuple)
        return same_members(expected.args, found.args, in_order=in_order)
    if isinstance(expected, sympy.MatrixBase) and isinstance(value, sympy.MatrixBase):
        return _compare_entries(expected, value)
    region, other = region_of(expected), region_of(found)
    if region is not None and other is not None:
        return same_region(region, other)
    if isinstance(expected, sympy.Expr) and isinstance(value, sympy.Expr):
        if _is_word(expected) and _is_word(value):
            return None
        return same_function(expected, value)
    return None


def _compare_entries(expected: Any, found: Any) -> bool | None:
    if expected.shape != found.shape:
        return False
    entries = list(expected), list(found)
    if all(map(is_constant, (*entries[0], *entries[1]))):
        return same_members(*entries, in_order=True)
    verdicts = [_compare(x, y, NO_DECIMALS) for x, y in zip(*entries, strict=True)]
    return False if False in verdicts else None if None in verdicts else True


def _is_word(value: Any) -> bool:
    """Whether a value is a word, which was read as a product of letters."""
    letters = value.args if value.is_Mul else (value,)
    return all(each.is_Symbol or each in (sympy.E, sympy.I) for each in letters)


def _right_side(value: Any) -> Any:
    """Return what the last of a chain of equations ends with, as math-verify does."""
    while isinstance(value, sympy.And) and value.args:
        value = getattr(value, "_unsorted_args", value.args)[-1]
    return value.rhs if isinstance(value, sympy.Eq) else value
