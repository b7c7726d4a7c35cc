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
    """This rival cannot copy a live interpreter."""


class Client(Protocol):
    """One user, with an interpreter of its own or, without state, a way to start processes."""

    async def call(self, code: str) -> str:
        """Run a program; return what it printed."""
        ...

    async def fork(self) -> Client:
        """A live copy. Raises CannotFork if there cannot be one."""
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
    """One row of the table."""

    name: str
    lacks: str
    """What it cannot do."""
    is_stateful: bool
    start: Callable[[], AbstractAsyncContextManager[Host]]
    """Starts the rival; raises Missing if it cannot run here."""


async def output_of(*command: str, **settings: object) -> str:
    """Run a command and return what it prints.

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
