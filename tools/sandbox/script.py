"""A whole program, and how it ended, as if by `python -u FILE`."""

from __future__ import annotations

from dataclasses import dataclass

from tir_alp.tools.outcome import Outcome
from tir_alp.tools.sandbox.result import RunResult

EXIT_STATUS = {
    Outcome.OK: 0,
    Outcome.TOOL_ERROR: 1,
    Outcome.TOOL_TIMEOUT: 124,  # as timeout(1)
    Outcome.RESOURCE_LIMIT: 137,  # as a shell reports a killed process
    Outcome.INFRA_ERROR: 70,  # EX_SOFTWARE
    Outcome.CANCELLED: 130,
}
"""What stands for an outcome if the program has no exit status of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """A program to run."""

    code: bytes
    """Its source, as in a file: a byte order mark and a `coding:` line are honoured."""
    stdin: bytes = b""
    """What it reads from descriptor 0."""


@dataclass(frozen=True, slots=True)
class ScriptResult:
    """How a program ended."""

    result: RunResult
    """The call's result; it is `OK` exactly if the exit status is 0."""
    exit_status: int
    """The program's own exit status, 128 + N after signal N, or one that stands for its outcome."""
