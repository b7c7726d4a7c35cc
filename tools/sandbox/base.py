"""What every sandbox offers, wherever its sessions live."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Protocol, Self

from tir_alp.tools.sandbox.config import Limits
from tir_alp.tools.sandbox.result import RunResult, SandboxReport


class Session(Protocol):
    """A stateful Python interpreter. Calls on one session run one after the other."""

    async def run(self, code: str, limits: Limits | None = None) -> RunResult:
        """Execute a cell; variables live on to the next one. Never raises for what `code` does.

        Args:
            code: Python source; the value of a last expression is shown as in a notebook.
            limits: Of this call; None takes those of the sandbox's config.
        """
        ...

    async def fork(self) -> Session:
        """An independent live copy: same variables, same files, its own future. Close it.

        Raises:
            SandboxError: The interpreter is gone or cannot be copied.
        """
        ...

    async def close(self) -> None:
        """Kill the interpreter. Closing twice is allowed."""
        ...

    async def __aenter__(self) -> Self:
        """The session itself."""
        ...

    async def __aexit__(self, *exc_info: object) -> None:
        """Close it."""
        ...


class Sandbox(Protocol):
    """Gives out sessions. Made by `create_sandbox`."""

    report: SandboxReport

    def session(self) -> AbstractAsyncContextManager[Session]:
        """A stateful interpreter that is killed at the end of the block.

        Raises:
            SandboxError: No session became free, or none could be made.
        """
        ...

    async def open_session(self) -> Session:
        """As `session`, for a caller that closes it itself."""
        ...
