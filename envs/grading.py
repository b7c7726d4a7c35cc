"""Grades answers: `grade` returns that an answer is right, wrong, or could not be graded.

Only the answer itself is examined, never the transcript around it. Text and numbers are compared
here, everything else by math-verify in a process that can be killed. An answer that cannot be
evaluated is wrong. `GRADER_ERROR` is left for what no answer can cause: a truth that cannot be
graded by itself, and graders that cannot be run.
"""

from __future__ import annotations

import atexit
import functools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction

from tir_alp.envs.grader_pool import GaveUp, GraderError, GraderPool
from tir_alp.tools.answer_text import (
    MAX_CHARS,
    Number,
    is_gradable,
    is_label,
    is_only_text,
    is_same_ratio,
    ratio_of,
    read_number,
    same_number,
    same_text,
    tidy,
)
from tir_alp.tools.outcome import Outcome

_RATIONAL = re.compile(r"[+-]?[0-9]{1,100}(?:/0*[1-9][0-9]{0,99})?")
_ARITHMETIC = re.compile(r"(?:[0-9 .+*/(){}-]|\\(?:times|cdot|div)(?![A-Za-z]))*")
_THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")
_DIGITS = re.compile(r"[0-9]+")
_TOWER = re.compile(r"(?:[_^][({ ]*\\?[A-Za-z0-9]{1,20}[)} ]*){8}")
_MAX_DIGITS = 400  # in a row
_MAX_NESTING = 12  # math-verify's time grows exponentially with the nesting of braces
_SPARE_CHARS = 200  # an answer may be this much longer than four times the truth

_pool = GraderPool(num_workers=min(8, os.cpu_count() or 1))


def _replace_pool() -> None:
    global _pool
    _pool.abandon()
    _pool = GraderPool(num_workers=_pool.num_workers)


# A forked child must not use its parent's graders: the two would read each other's verdicts.
os.register_at_fork(after_in_child=_replace_pool)
atexit.register(lambda: _pool.close())


@dataclass(frozen=True, slots=True)
class Grade:
    """The result of comparing an answer with the truth."""

    correct: bool | None
    """Whether the answer is right; None if it could not be graded."""
    outcome: Outcome = Outcome.OK
    """`OK` or `GRADER_ERROR`."""
    error: str = ""
    """Why there is no verdict, or why an answer with the right value is wrong; for people."""
    score: float | None = None
    """Reward of the answer; None: 1 if it is correct, else 0."""
    terms: Mapping[str, float] = field(default_factory=dict)
    """The parts of the score by name; empty if it has none."""

    @property
    def reward(self) -> float:
        """Reward of the answer."""
        return float(bool(self.correct)) if self.score is None else self.score


def grade(answer: str, truth: str) -> Grade:
    r"""Compare an answer with the truth, as text, as numbers, and as mathematics.

    Text, numbers and fractions are compared here, in microseconds; everything else is compared by
    math-verify, in a few milliseconds. docs/environments.md states the rules.

    If the truth is a number, a sum, product or quotient that was not worked out is refused, even if
    its value is right: otherwise boxing the question `37*48+112` would solve it.

    Example:
        >>> grade("0.5", "1/2").correct
        True
        >>> grade("1+1", "2").correct
        False
        >>> grade("false", "true").correct
        False
    """
    answer, truth = answer.strip(), truth.strip()
    if answer == truth:
        return Grade(correct=True)
    if _RATIONAL.fullmatch(answer) and _RATIONAL.fullmatch(truth):
        return Grade(correct=Fraction(answer) == Fraction(truth))
    if len(answer) > max(MAX_CHARS, 2 * len(truth)):
        return Grade(correct=False, error="the answer is too long")
    expected = _read_truth(truth)
    if expected is None:
        return Grade(
            correct=None,
            outcome=Outcome.GRADER_ERROR,
            error=f"the truth {truth!r:.200} cannot be graded: it is neither text nor mathematics",
        )
    return _compare(tidy(answer), expected)


@dataclass(frozen=True, slots=True)
class _Truth:
    """What is known of a truth before any answer is looked at."""

    text: str
    """Tidied."""
    number: Number | None
    """The truth as a number, if it is one."""
    ratio: tuple[Fraction, ...] | None
    """The truth as a ratio such as 2:3, if it is one."""
    is_text: bool
    """Whether it is compared as text only."""


@functools.lru_cache(maxsize=4096)
def _read_truth(truth: str) -> _Truth | None:
    if not is_gradable(truth):
        return None
    text = tidy(truth)
    number, ratio = read_number(text), ratio_of(text)
    is_text = number is None and (is_only_text(text) or len(text) > MAX_CHARS)
    return _Truth(text, number, ratio, is_text)


def _compare(answer: str, truth: _Truth) -> Grade:
    if same_text(answer, truth.text):
        return Grade(correct=True)
    if truth.is_text or is_label(answer):
        return Grade(correct=False)
    if truth.ratio is not None:
        return Grade(correct=is_same_ratio(answer, truth.ratio))
    number = read_number(_right_side(answer))
    if truth.number is not None:
        if number is not None:
            return Grade(correct=same_number(number, truth.number))
        if _is_arithmetic(_right_side(answer)):
            return Grade(correct=False, error="the answer is an expression that was not worked out")
    if not answer or _is_too_large(answer, truth.text):
        return Grade(correct=False, error="the answer is too large to be evaluated" * bool(answer))
    request = (
        answer,
        truth.text,
        (_as_decimal(number), _as_decimal(truth.number)),
        truth.number is not None,
    )
    try:
        # None: the truth is no mathematics, so it is text, which was compared above.
        return Grade(correct=bool(_pool.verify(*request)))
    except GaveUp as error:
        return _without_verdict(truth.text, error)
    except GraderError as error:
        return Grade(correct=None, outcome=Outcome.GRADER_ERROR, error=str(error))


def _without_verdict(truth: str, failure: GaveUp) -> Grade:
    """Return the grade of an answer on which the grader gave up: wrong, if the truth is fine."""
    try:
        fault = _fault_of(truth)
    except GraderError as error:
        return Grade(correct=None, outcome=Outcome.GRADER_ERROR, error=str(error))
    if fault:
        return Grade(correct=None, outcome=Outcome.GRADER_ERROR, error=fault)
    return Grade(correct=False, error=f"the answer cannot be evaluated: {failure}")


@functools.lru_cache(maxsize=4096)
def _fault_of(truth: str) -> str:
    """Return why a truth cannot be graded against a simple answer; "" if it can."""
    try:
        _pool.verify("0", truth, (None, None), False)
    except GaveUp as error:
        return f"the truth {truth!r:.200} cannot be evaluated: {error}"
    return ""


def _right_side(answer: str) -> str:
    """Return what follows the last equals sign of a single chain of equations."""
    left, sign, right = answer.rpartition("=")
    if not sign or left.endswith(("<", ">", "!", "~")) or re.search(r"[,;]|\bor\b|\band\b", left):
        return answer
    return right.strip()


def _is_arithmetic(answer: str) -> bool:
    answer = _THOUSANDS.sub("", answer)
    answer = _THOUSANDS.sub("", answer)
    return _ARITHMETIC.fullmatch(answer) is not None and len(_DIGITS.findall(answer)) > 1


def _is_too_large(answer: str, truth: str) -> bool:
    """Whether an answer is too long, too deeply nested or has too many digits to be parsed."""
    if len(answer) > 4 * len(truth) + _SPARE_CHARS or _TOWER.search(answer):
        return True
    if any(len(digits) > max(_MAX_DIGITS, len(truth)) for digits in _DIGITS.findall(answer)):
        return True
    return _nesting(answer) > max(_MAX_NESTING, _nesting(truth))


def _nesting(text: str) -> int:
    depth = deepest = 0
    for each in text:
        depth += (each in "({[") - (each in ")}]")
        deepest = max(deepest, depth)
    return deepest


def _as_decimal(number: Number | None) -> tuple[int, int, int] | None:
    if number is None or number.places is None or number.is_percent:
        return None
    return number.value.numerator, number.value.denominator, number.places
