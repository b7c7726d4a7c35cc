"""Is an answer right? `grade` says yes, no, or that it could not be found out.

Only the answer itself is looked at, never the transcript around it. What math-verify has to decide
is decided in a process that can be killed; a grader that hangs or crashes gives `GRADER_ERROR`,
and never a wrong answer.
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
# A sum, difference or product. Not: a sign, an exponent's sign, a power of ten in 1.5\times10^3.
_UNEVALUATED = re.compile(
    r"(?:[*\u00b7\u00d7\u22c5]|\\times|\\cdot)(?!\s*10\s*\^)|\u00f7|\\(?:div|sum|prod)"
    r"|[^\s{($]\s*[-+]"
)

_pool = GraderPool(num_workers=min(8, os.cpu_count() or 1))


def _replace_pool() -> None:
    global _pool
    _pool = GraderPool(num_workers=_pool.num_workers)


# A forked child must not talk to its parent's graders: the two would read each other's verdicts.
os.register_at_fork(after_in_child=_replace_pool)
atexit.register(lambda: _pool.close())


@dataclass(frozen=True, slots=True)
class Grade:
    """What came of comparing an answer with the truth."""

    correct: bool | None
    """None where it could not be found out."""
    outcome: Outcome = Outcome.OK
    """`OK` or `GRADER_ERROR`."""
    error: str = ""
    """For people: why there is no verdict, or what made a right value a wrong answer."""
    score: float | None = None
    """What the answer earns; None: 1 if it is correct, else 0."""

    @property
    def reward(self) -> float:
        """What the answer earns."""
        return float(bool(self.correct)) if self.score is None else self.score


def grade(answer: str, truth: str) -> Grade:
    r"""Compare an answer with the truth.

    Equal strings and plain integers and fractions are compared here, in microseconds; all else by
    math-verify, which takes some milliseconds.

    Where the truth is a number, a sum or a product is not an answer, even of that value:
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
