"""Grades a function by the values that it returns, and a program by what it prints, on the host.

The sandbox receives the program, and the arguments or the input of one test at a time. What is
expected never enters it, and none of the code that decides runs there: the best that a program can
do, even after taking over its interpreter, is to return or print what is right.
"""

from __future__ import annotations

from contextlib import closing

from tir_alp.envs.grading import Grade
from tir_alp.tools.code_forms import FunctionTests, ProgramTests
from tir_alp.tools.outcome import Outcome
from tir_alp.tools.sandbox import BlockingSandbox, Limits
from tir_alp.tools.sandbox.result import RunResult
from tir_alp.tools.sandbox.script import Script

_MAX_CHARS = 1_000_000  # that a sandbox returns
_SPARE_CHARS = 1000  # a value's text may be this much longer than that of the expected value
# Runs in the sandbox, before the program: it is a module, so that `if __name__ == "__main__":` is
# not its business. Modules are looked up by name, by dataclasses for one.
_AS_MODULE = """
__import__("sys").modules["solution"] = __import__("sys").modules["__main__"]
__name__ = "solution"
"""
# Runs in the sandbox, after the program: values of the standard library become plain ones. What it
# writes is a program's claim about its own value, as before; the host alone compares. A generator,
# a range or a deque becomes a list where the test does more with it than to compare it.
_PLAIN = """
def _as_plain(value, depth=0):
    import builtins, collections.abc, decimal, fractions, types
    is_a, plain = builtins.isinstance, lambda each: _as_plain(each, depth + 1)
    if depth > 100 or value is None or is_a(value, (builtins.bool, builtins.str, builtins.bytes)):
        return value
    if is_a(value, builtins.int):
        return builtins.int.__add__(value, 0)
    if is_a(value, (fractions.Fraction, decimal.Decimal)):
        is_whole = value == value.__class__(builtins.int(value))
        return builtins.int(value) if is_whole else builtins.float(value)
    if is_a(value, (builtins.bytearray, builtins.memoryview)):
        return builtins.bytes(value)
    if is_a(value, collections.UserString):
        return builtins.str(value)
    dicts = builtins.dict, collections.UserDict, collections.ChainMap, types.MappingProxyType
    if is_a(value, dicts):
        return {plain(key): plain(each) for key, each in value.items()}
    if is_a(value, (collections.UserList, builtins.list)):
        return [plain(each) for each in value]
    if is_a(value, builtins.tuple):
        return builtins.tuple(plain(each) for each in value)
    views = collections.abc.KeysView, collections.abc.ItemsView
    if is_a(value, (builtins.set, builtins.frozenset, *views)):
        return {plain(each) for each in value}
    if builtins.type(value).__module__ == "numpy" and builtins.getattr(value, "ndim", 1) == 0:
        return value.item()
    return value


def _as_list(value):
    import builtins, itertools
    kinds = "str", "bytes", "dict", "list", "tuple", "set", "frozenset"
    known = builtins.tuple(builtins.getattr(builtins, each) for each in kinds)
    if builtins.isinstance(value, known) or not builtins.hasattr(value, "__iter__"):
        return value
    return builtins.list(itertools.islice(value, 100_000))
"""


def grade_function(
    source: str, tests: FunctionTests, sandbox: BlockingSandbox, limits: Limits
) -> Grade:
    """Run a function on the arguments of all tests, and compare the values that it returns.

    Args:
        source: Program that defines the function, or a class `Solution` with it as a method.
        tests: Hidden tests; the first failure ends the grading.
        sandbox: Sandbox in which the function runs, in a session of its own.
        limits: Limits for running the definition, and for each test.

    Raises:
        SandboxError: There is no session.
    """
    name = tests.entry_point
    function = (
        f"({name} if {name!r} in globals() or 'Solution' not in globals() else Solution().{name})"
    )
    calls = []
    for case in tests.cases:
        call = f"{function}(*{case.args!r}, **{dict(case.kwargs)!r})"
        if case.is_of_truth:  # a match of `re` is true, and no literal
            call = f"True if {call} else False"
        elif case.condition:
            call = f"_as_list({call})"
        calls.append(f"{_PLAIN}\n_as_plain({call})")
    with closing(sandbox.session()) as session:
        for number, call in enumerate([_AS_MODULE, f"{source}\nNone", *calls], start=-2):
            case = tests.cases[number] if number >= 0 else None
            room = len(repr(case.expected)) + _SPARE_CHARS if case else _SPARE_CHARS
            result = session.run(call, limits.model_copy(update={"output_chars": room}))
            failed = _failure(result, "the definition" if case is None else f"test {number}")
            if failed is not None:
                return failed
            if case is not None and not case.is_passed(result.value):
                return Grade(correct=False, error=f"test {number} returned something else")
    return Grade(correct=True)


def grade_program(
    source: str, tests: ProgramTests, sandbox: BlockingSandbox, limits: Limits
) -> Grade:
    """Run a program on the input of each test, and compare what it prints.

    Args:
        source: The program.
        tests: Hidden tests; the first failure ends the grading.
        sandbox: Sandbox in which the program runs, in a new session for each test.
        limits: Limits of each test.

    Raises:
        SandboxError: There is no session.
    """
    for number, case in enumerate(tests.cases):
        room = min(2 * len(case.expected) + _SPARE_CHARS, _MAX_CHARS)  # a space may end each line
        script = Script(
            code=source.encode(errors="surrogatepass"), stdin=case.stdin.encode(errors="replace")
        )
        with closing(sandbox.session()) as session:
            ended = session.run_script(script, limits.model_copy(update={"output_chars": room}))
        failed = _failure(ended.result, f"test {number}")
        if failed is not None:
            return failed
        if not case.is_passed(ended.result.stdout):
            return Grade(correct=False, error=f"test {number} printed something else")
    return Grade(correct=True)


def _failure(result: RunResult, what: str) -> Grade | None:
    """Return the grade of a call that did not end well; None if it did."""
    if result.outcome.is_infrastructure:
        return Grade(correct=None, outcome=Outcome.GRADER_ERROR, error=result.stderr)
    if result.outcome is not Outcome.OK:
        lines = result.stderr.strip().splitlines() or [result.outcome.value]
        return Grade(correct=False, error=f"{what} failed: {lines[-1]}")
    return None
