"""What the benchmark asks of every way to run Python: start, open a client, call, fork."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol


class Missing(Exception):
    """This rival cannot run here; the message says why."""


class CannotFork(Exception):
    """It has no copy of a live interpreter to give."""


class Client(Protocol):
    """One user: an interpreter of its own, or, where there is no state, a place to start them."""

    async def call(self, code: str) -> str:
        """Run a program; returns what it printed."""
        ...

    async def fork(self) -> Client:
        """A live copy. Raises CannotFork where there is none."""
        ...

    async def close(self) -> None:
        """Free it."""
        ...


class Host(Protocol):
    """A rival that has started."""

    async def open(self) -> Client:
        """A new client."""
        ...


@dataclass(frozen=True, slots=True)
class Rival:
    """A row of the table."""

    name: str
    lacks: str
    """What it cannot do."""
    is_stateful: bool
    start: Callable[[], AbstractAsyncContextManager[Host]]
    """Raises Missing."""


async def output_of(*command: str, **settings: object) -> str:
    """What a command prints.

    Raises:
        RuntimeError: It failed.
    """
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        **settings,  # type: ignore[arg-type]
    )
    out, err = await process.communicate()
    if process.returncode != 0:
        raise RuntimeError(f"{command[0]} ended with {process.returncode}: {err.decode()[-500:]}")
    return out.decode()
