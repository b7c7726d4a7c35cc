"""The Python tool: takes code and returns the text that a model reads.

The text is what a notebook would show: what was printed, the value of the last expression, the end
of the traceback. It is never longer than `max_output_chars`, and never empty.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from tir_alp.tools.base import ToolReport, ToolResult, ToolSession
from tir_alp.tools.outcome import Outcome
from tir_alp.tools.sandbox import Limits, RunResult, SandboxConfig, SandboxError, SandboxRefused
from tir_alp.tools.sandbox.blocking import BlockingSession, shared_sandbox
from tir_alp.tools.sandbox.output import cut_middle

NO_OUTPUT = "[no output]"
"""What the model reads when its program printed nothing and has no value."""

_STDERR_LINES = 12


class PythonToolSession:
    """The interpreter of one episode, which the first call starts."""

    def __init__(self) -> None:
        self.interpreter: BlockingSession | None = None

    def close(self) -> None:
        """Kill the interpreter, if there is one. Closing twice is allowed."""
        if self.interpreter is not None:
            self.interpreter.close()
            self.interpreter = None


class PythonTool:
    """Runs Python in the sandbox; variables last for the episode, or for one call.

    All tools of a process that have the same sandbox config share one sandbox.
    """

    name = "python"
    description = (
        "Runs Python code in a sandboxed interpreter and returns what it prints, and the value of "
        "its last expression. There is no network. "
    )
    parameters: Mapping[str, Any] = {
        "type": "object",
        "properties": {"code": {"type": "string", "description": "Python source code to run."}},
        "required": ["code"],
    }
    harmless: Mapping[str, Any] = {"code": "print(1)"}

    def __init__(
        self,
        sandbox: SandboxConfig | Mapping[str, Any] | None = None,
        *,
        limits: Limits | Mapping[str, Any] | None = None,
        max_output_chars: int = 4096,
        stateful: bool = True,
    ) -> None:
        """Check the settings; nothing is started before the first call.

        Args:
            sandbox: Config of the sandbox; None takes the defaults.
            limits: Limits of each call; None takes those of `sandbox`.
            max_output_chars: Greatest length of the text that the model reads, in characters.
            stateful: Whether variables are kept between the calls of an episode; otherwise each
                call has a fresh interpreter.
        """
        self._config = SandboxConfig.model_validate(sandbox or {})
        self._limits = self._config.limits if limits is None else Limits.model_validate(limits)
        self._max_output_chars = max_output_chars
        self._stateful = stateful
        kept = "kept" if stateful else "not kept"
        self.description = f"{PythonTool.description}Variables are {kept} between calls."

    def open_session(self) -> PythonToolSession:
        """A session whose interpreter is not started yet."""
        return PythonToolSession()

    def report(self) -> ToolReport:
        """Which sandbox backend was taken, and why the stronger ones were not.

        Raises:
            SandboxError: There is no sandbox.
        """
        report = shared_sandbox(self._config).report
        return ToolReport(
            runs_in={"sandbox": report.backend, "refused": report.refused},
            warnings=report.warnings,
        )

    def run(self, arguments: Mapping[str, Any], session: ToolSession) -> ToolResult:
        """Run `arguments["code"]`.

        Raises:
            SandboxRefused: This machine cannot confine a program; a retry would not help.
        """
        assert isinstance(session, PythonToolSession)
        started = time.perf_counter()
        code = arguments.get("code")
        if not isinstance(code, str):
            text = "[the tool takes one argument, `code`, a string of Python source]"
            return ToolResult(outcome=Outcome.TOOL_ERROR, text=text, duration_s=0.0, error=text)
        try:
            if session.interpreter is None:
                session.interpreter = shared_sandbox(self._config).session()
        except SandboxRefused:
            raise
        except SandboxError as error:
            text = "[the tool is not available]"
            return ToolResult(
                outcome=Outcome.INFRA_ERROR,
                text=text,
                duration_s=time.perf_counter() - started,
                error=str(error),
            )
        result = session.interpreter.run(code, self._limits)
        if not self._stateful:
            session.close()
        text, _ = cut_middle(_as_text(result), self._max_output_chars)
        return ToolResult(
            outcome=result.outcome,
            text=text,
            duration_s=time.perf_counter() - started,
            error="" if result.outcome is Outcome.OK else result.stderr,
        )


def _as_text(result: RunResult) -> str:
    note = f"[{result.note}]" if result.note else ""
    stderr = result.stderr.rstrip("\n").split("\n")
    pieces = (note, result.stdout, result.value or "", "\n".join(stderr[-_STDERR_LINES:]))
    return "\n".join(piece.rstrip("\n") for piece in pieces if piece) or NO_OUTPUT
