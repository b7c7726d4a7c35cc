"""Grades answers: `grade` returns that an answer is right, wrong, or could not be graded.

Only the answer itself is examined, never the transcript around it. math-verify runs in a process
that can be killed; a grader that hangs or crashes results in `GRADER_ERROR`, never in a wrong
answer.
"""

from __future__ import annotations

import atexit
import os
import re
from dataclasses import dataclass
from fractions import Fraction

from tir_alp.envs.grader_pool import GraderError, GraderPool
from tir_alp.tools.outcome import Outcome

_RATIONAL = re.compile(r"[+-]?[0-9]{1,100}(?:/0*[1-9][0-9]{0,99})?")
_NUMBER = re.compile(r"[+-]?[0-9][0-9,.]*(?:/[0-9]+)?")
# A sum, difference or product, but no sign, exponent's sign, or power of ten in 1.5\times10^3.
_UNEVALUATED = re.compile(
    r"(?:[*\u00b7\u00d7\u22c5]|\\times|\\cdot)(?!\s*10\s*\^)|\u00f7|\\(?:div|sum|prod)"
    r"|[^\s{($]\s*[-+]"
)

_pool = GraderPool(num_workers=min(8, os.cpu_count() or 1))


def _replace_pool() -> None:
    global _pool
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

    @property
    def reward(self) -> float:
        """Reward of the answer."""
        return float(bool(self.correct)) if self.score is None else self.score


def grade(answer: str, truth: str) -> Grade:
    r"""Compare an answer with the truth.

    Equal strings, plain integers and fractions are compared here, in microseconds; everything else
    is compared by math-verify, in a few milliseconds.

    If the truth is a number, a sum or product is not accepted, even if its value is right:
    otherwise boxing the question `37*48+112` would solve it.

    Example:
        >>> grade("0.5", "1/2").correct
        True
        >>> grade("1+1", "2").correct
        False
    """
    answer, truth = answer.strip(), truth.strip()
    if answer == truth:
        return Grade(correct=True)
    if _RATIONAL.fullmatch(answer) and _RATIONAL.fullmatch(truth):
        return Grade(correct=Fraction(answer) == Fraction(truth))
    if _NUMBER.fullmatch(truth) and _UNEVALUATED.search(answer.rpartition("=")[2]):
        return Grade(correct=False, error="the answer is an expression that was not worked out")
    try:
        return Grade(correct=_pool.verify(answer, truth))
    except GraderError as error:
        return Grade(correct=None, outcome=Outcome.GRADER_ERROR, error=str(error))
