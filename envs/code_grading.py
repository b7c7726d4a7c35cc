"""Grades a function with hidden tests, on the host, by the values that the function returns.

The sandbox receives the function, and the arguments of one test at a time. The expected values
never enter it, and none of the code that decides runs there: the best that a program can do, even
after taking over its interpreter, is to return the right value.
"""

from __future__ import annotations

from collections.abc import Sequence

from tir_alp.envs.grading import Grade
from tir_alp.tools.code_tests import Case
from tir_alp.tools.outcome import Outcome
from tir_alp.tools.sandbox import BlockingSandbox, Limits, SandboxError, SandboxRefused

_SPARE_CHARS = 1000  # a value's text may be this much longer than that of the expected value
# Runs in the sandbox, after the program: values of the standard library become plain ones. What it
# writes is a program's claim about its own value, as before; the host alone compares.
_PLAIN = """
def _as_plain(value, depth=0):
    import builtins, collections, decimal, fractions
    is_a, plain = builtins.isinstance, lambda each: _as_plain(each, depth + 1)
    if depth > 100 or value is None or is_a(value, (builtins.bool, builtins.str, builtins.bytes)):
        return value
    if is_a(value, builtins.int):
        return builtins.int.__add__(value, 0)
    if is_a(value, (fractions.Fraction, decimal.Decimal)):
        is_whole = value == value.__class__(builtins.int(value))
        return builtins.int(value) if is_whole else builtins.float(value)
    if is_a(value, (collections.UserDict, builtins.dict)):
        return {plain(key): plain(each) for key, each in value.items()}
    if is_a(value, (collections.UserList, builtins.list)):
        return [plain(each) for each in value]
    if is_a(value, builtins.tuple):
        return builtins.tuple(plain(each) for each in value)
    if is_a(value, (builtins.set, builtins.frozenset)):
        return {plain(each) for each in value}
    if builtins.type(value).__module__ == "numpy" and builtins.getattr(value, "ndim", 1) == 0:
        return value.item()
    return value
"""


def grade_function(
    source: str,
    entry_point: str,
    cases: Sequence[Case],
    sandbox: BlockingSandbox,
    limits: Limits,
) -> Grade:
    """Run a function on the arguments of all tests, and compare the values that it returns.

    Args:
        source: Program that defines the function.
        entry_point: Name of the function.
        cases: Hidden tests; the first failure ends the grading.
        sandbox: Sandbox in which the function runs, in a session of its own.
        limits: Limits for running the definition, and for each test.
    """
    try:
        session = sandbox.session()
    except SandboxRefused:
        raise
    except SandboxError as error:
        return Grade(correct=None, outcome=Outcome.GRADER_ERROR, error=str(error))
    try:
        calls = [
            f"{_PLAIN}\n_as_plain({entry_point}(*{case.args!r}, **{dict(case.kwargs)!r}))"
            for case in cases
        ]
        for number, call in enumerate([f"{source}\nNone", *calls], start=-1):
            case = cases[number] if number >= 0 else None
            room = len(repr(case.expected)) + _SPARE_CHARS if case else _SPARE_CHARS
            result = session.run(call, limits.model_copy(update={"output_chars": room}))
            if result.outcome.is_infrastructure:
                return Grade(correct=None, outcome=Outcome.GRADER_ERROR, error=result.stderr)
            if result.outcome is not Outcome.OK:
                what = "the definition" if case is None else f"test {number}"
                lines = result.stderr.strip().splitlines() or [result.outcome.value]
                return Grade(correct=False, error=f"{what} failed: {lines[-1]}")
            if case is not None and not case.is_passed(result.value):
                return Grade(correct=False, error=f"test {number} returned something else")
    finally:
        session.close()
    return Grade(correct=True)
