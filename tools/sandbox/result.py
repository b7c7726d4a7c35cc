"""What comes out of a sandbox: the result of a call, or the reason why there is no sandbox."""

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
    """What the program wrote there, its traceback, and why it was killed if it was."""
    value: str | None
    """`repr` of the last expression, as in a notebook; None if there is none."""
    duration_s: float
    """Wall-clock seconds of the call, a wait for a fresh interpreter included."""
    cpu_s: float
    """Processor seconds of the program; 0.0 where a crash left none to read."""
    truncated: bool
    """Whether something was cut out of `stdout`, `stderr` or `value`."""
    queue_s: float = 0.0
    """Seconds of `duration_s` before the program began: for earlier calls of the session, for
    memory that other calls hold, for a fresh interpreter."""
    output_bytes: int = 0
    """What the program printed, on stdout and stderr together, before anything was cut."""
    peak_memory_mb: float = 0.0
    """The most memory that the interpreter has held since its birth, modules that it shares with
    others included; what was last seen of it where a crash left none to read."""
    note: str = ""
    """Set where variables were lost other than by the call's own outcome: earlier ones, so that it
    began in a fresh interpreter, or its own, because the interpreter had come to the end of its
    `Lifetime`."""


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
    """This machine does not hold what the backend promises, so the sandbox does not start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxReport:
    """Which backend was taken, and why none that is stronger.

    Example: `SandboxReport(backend="landlock", refused={"namespaces": "no bubblewrap: ..."})`.
    """

    backend: str
    refused: dict[str, str] = field(default_factory=dict)
    """Stronger backends and what kept each from starting."""
    warnings: tuple[str, ...] = ()
    """What must not be overlooked, in sentences."""
