"""What every sandbox offers, wherever its sessions live."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Protocol, Self

from tir_alp.tools.sandbox.config import Limits
from tir_alp.tools.sandbox.result import RunResult, SandboxReport
from tir_alp.tools.sandbox.script import Script, ScriptResult


class Session(Protocol):
    """A stateful Python interpreter. The calls of one session run one after the other."""

    async def run(self, code: str, limits: Limits | None = None) -> RunResult:
        """Execute a cell; its variables are kept for the next one. Never raises for what it does.

        Args:
            code: Python source; the value of the last expression is returned, as in a notebook.
            limits: Limits of this call; None takes those of the sandbox's config.
        """
        ...

    async def run_script(self, script: Script, limits: Limits | None = None) -> ScriptResult:
        """Run a whole program as `python -u FILE` would. Never raises for what it does.

        Its variables are gone afterwards, its files are not, unless it has ended the interpreter.
        Only for a session that has run no other program.
        """
        ...

    async def fork(self) -> Session:
        """An independent live copy with the same variables and files. Close it.

        Raises:
            SandboxError: The interpreter is gone or cannot be copied.
        """
        ...

    async def close(self) -> None:
        """Kill the interpreter. Closing twice is allowed."""
        ...

    async def __aenter__(self) -> Self:
        """Return the session itself."""
        ...

    async def __aexit__(self, *exc_info: object) -> None:
        """Close the session."""
        ...


class Sandbox(Protocol):
    """Gives out sessions. Make one with `create_sandbox`."""

    report: SandboxReport

    def session(self) -> AbstractAsyncContextManager[Session]:
        """A stateful interpreter that is killed at the end of the block.

        Raises:
            SandboxError: No session became free, or none could be made.
        """
        ...

    async def open_session(self) -> Session:
        """As `session`, for a caller that closes the session itself."""
        ...
