"""The default judge of `grader_process`: asks math-verify whether an answer equals the truth.

Neither of math-verify's own time limits is used: they raise from a signal handler, and such an
exception can be swallowed by sympy's `except Exception` blocks and delayed by long C calls.
"""

from __future__ import annotations

from math_verify import parse, verify
from math_verify.parser import LatexExtractionConfig


def _parse(text: str) -> list:
    # Inside a box the whole text counts as the expression: nothing is searched for in it.
    return parse(
        f"\\boxed{{{text}}}",
        extraction_config=(LatexExtractionConfig(boxed_match_priority=0),),
        fallback_mode="no_fallback",
        extraction_mode="first_match",
        parsing_timeout=None,  # pyright: ignore[reportArgumentType]
    )


def judge(answer: str, truth: str) -> bool | str:
    """Return whether the answer equals the truth, or a string if the truth cannot be parsed."""
    expected = _parse(truth)
    if not expected:
        return f"math-verify cannot read the truth {truth!r}"
    return verify(expected, _parse(answer), timeout_seconds=None, raise_on_error=True)
