"""Runs a whole program in a fresh session, as `python FILE` would: with stdin and exit status."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

from tir_alp.tools.outcome import Outcome
from tir_alp.tools.sandbox.base import Session
from tir_alp.tools.sandbox.config import Limits
from tir_alp.tools.sandbox.result import RunResult

_STDIN = """
import io, sys
sys.stdin = io.TextIOWrapper(io.BytesIO({data!r}), encoding="utf-8")
del io, sys
"""
_TRACEBACK = "Traceback (most recent call last):\n"
EXIT_STATUS = {
    Outcome.OK: 0,
    Outcome.TOOL_ERROR: 1,
    Outcome.TOOL_TIMEOUT: 124,  # as timeout(1)
    Outcome.RESOURCE_LIMIT: 137,  # as a shell reports a killed process
    Outcome.INFRA_ERROR: 70,  # EX_SOFTWARE
    Outcome.CANCELLED: 130,
}


@dataclass(frozen=True, slots=True)
class ScriptResult:
    """How a program ended."""

    result: RunResult
    """The call's result; `SystemExit` with status 0 is `OK` here."""
    exit_status: int
    """The program's own exit status, or one that stands for its outcome."""


async def run_script(
    session: Session, code: str, *, stdin: str = "", limits: Limits | None = None
) -> ScriptResult:
    """Run a program in a session that has run nothing yet."""
    if stdin:
        await session.run(_STDIN.format(data=stdin.encode("utf-8", "surrogatepass")))
    return _with_status(await session.run(code, limits))


def _with_status(result: RunResult) -> ScriptResult:
    ending = _system_exit(result.stderr)
    if result.outcome is not Outcome.TOOL_ERROR or ending is None:
        return ScriptResult(result, EXIT_STATUS[result.outcome])
    before, status = ending
    message = ""
    if status == "None":
        number = 0
    elif re.fullmatch(r"-?\d{1,9}", status):
        number = int(status) & 0xFF
    else:
        number, message = 1, status + "\n"
    ended = dataclasses.replace(
        result,
        outcome=Outcome.TOOL_ERROR if number else Outcome.OK,
        stderr=before + message,
    )
    return ScriptResult(ended, number)


def _system_exit(stderr: str) -> tuple[str, str] | None:
    """What precedes the traceback of a `SystemExit` at the end of a text, and its status.

    None if the text does not end with one. Linear in the length of the text.
    """
    before, header, traceback = stderr.rpartition(_TRACEBACK)
    lines = traceback.split("\n")
    if not header or len(lines) < 2 or (before and not before.endswith("\n")):
        return None
    *frames, last, rest = lines
    name, _, status = last.partition(": ")
    if rest or name != "SystemExit" or not all(line.startswith(" ") for line in frames):
        return None
    return before, status or "None"
