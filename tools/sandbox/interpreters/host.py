"""What makes interpreters: a fork server, or a container with a kernel of its own."""

from __future__ import annotations

from typing import Protocol

from tir_alp.tools.sandbox.config import Lifetime
from tir_alp.tools.sandbox.interpreters.interpreter import Interpreter


class InterpreterHost(Protocol):
    """One live maker of interpreters, which end with it. Once it is dead it stays dead.

    A jail makes hosts; making one allocates nothing, and `start` starts it.
    """

    @property
    def dead(self) -> bool:
        """Whether it can make no more interpreters; noticed by the event loop, so a moment late."""
        ...

    @property
    def stopped(self) -> bool:
        """Whether nothing of it is left: no process, no descriptor."""
        ...

    async def start(self) -> None:
        """Start it and wait until its modules are loaded.

        Raises:
            SandboxRefused: It is not confined as it was asked to be; the message says how.
            SandboxError: It did not come up; the message has its last words.
        """
        ...

    async def new_interpreter(self) -> Interpreter:
        """A fresh interpreter, in which nothing has run yet.

        Raises:
            SandboxError: It made none.
        """
        ...

    def worn_out(self, lifetime: Lifetime) -> str:
        """Why it should be replaced; empty if it need not be."""
        ...

    async def vacated(self) -> None:
        """Wait until no interpreter depends on it any more."""
        ...

    async def stop(self) -> None:
        """End it and with it every interpreter; wait until none of them is left."""
        ...
