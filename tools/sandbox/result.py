"""What a sandbox returns: the result of a call, a report about itself, or an error.

`RunResult` is how one call ended. `SandboxReport` is which backend a run got and why; a run prints
and records it. `SandboxError` and `SandboxRefused` are the failures for which no program is to
blame.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tir_alp.tools.outcome import Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    r"""How one call ended, and everything that it printed until then.

    Example: `print(6 * 7)` and then `'a'` gives
    `RunResult(outcome=Outcome.OK, stdout="42\n", stderr="", value="'a'", duration_s=0.0002, ...)`.
    """

    outcome: Outcome
    stdout: str
    stderr: str
    """What the program wrote to stderr, its traceback and, if it was killed, the reason."""
    value: str | None
    """`repr` of the last expression, as in a notebook; None if there is none."""
    duration_s: float
    """Wall-clock seconds of the call, including a wait for a fresh interpreter."""
    cpu_s: float
    """Processor seconds of the program; 0.0 if a crash left none to read."""
    truncated: bool
    """Whether something was cut out of `stdout`, `stderr` or `value`."""
    queue_s: float = 0.0
    """Seconds of `duration_s` before the program began: a wait for earlier calls of the session,
    for memory that other calls hold, or for a fresh interpreter."""
    output_bytes: int = 0
    """Bytes that the program printed on stdout and stderr together, before anything was cut."""
    peak_memory_mb: float = 0.0
    """The most memory that the interpreter has held since its birth, including modules that it
    shares with others; the last measurement if a crash left none to read."""
    note: str = ""
    """Set if variables were lost other than through the call's own outcome: earlier ones, so that
    the call began in a fresh interpreter, or its own, because the interpreter had reached the end
    of its `Lifetime`."""


def failed_result(error: Exception, duration_s: float) -> RunResult:
    """The result of a call that the sandbox could not make."""
    return RunResult(
        outcome=Outcome.INFRA_ERROR,
        stdout="",
        stderr=f"[the sandbox failed: {error}]\n",
        value=None,
        duration_s=duration_s,
        cpu_s=0.0,
        truncated=False,
    )


class SandboxError(Exception):
    """The sandbox failed; no program is to blame."""


class SandboxRefused(SandboxError):
    """This machine does not enforce what the backend promises, so the sandbox does not start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxReport:
    """Which backend was taken, and why the stronger ones were not.

    Example: `SandboxReport(backend="landlock", refused={"namespaces": "no bubblewrap: ..."})`.
    """

    backend: str
    refused: dict[str, str] = field(default_factory=dict)
    """Stronger backend -> what kept it from starting."""
    warnings: tuple[str, ...] = ()
    """Whole sentences that must not be overlooked."""
