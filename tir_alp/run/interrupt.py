"""Ctrl-C and SIGTERM: the run ends where nothing is half done, so that it can be saved.

The second signal ends the process as it would without this module.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """The user asked the run to end."""


class Interrupt:
    """Whether the user asked for an end.

    Args:
        log: Called at once with a sentence when that happens.
        end: What comes next, for that sentence.
    """

    def __init__(
        self,
        log: Callable[[str], None] = lambda line: None,
        end: str = "the run saves a checkpoint and ends",
    ) -> None:
        self._asked, self._log, self._end = asyncio.Event(), log, end

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals; in the main thread, and in its event loop."""
        loop = asyncio.get_running_loop()

        def ask() -> None:
            self._asked.set()
            self._log(f"stopping: {self._end}; Ctrl-C again ends it at once")
            for each in _SIGNALS:
                loop.remove_signal_handler(each)

        for each in _SIGNALS:
            loop.add_signal_handler(each, ask)
        try:
            yield
        finally:
            for each in _SIGNALS:
                loop.remove_signal_handler(each)

    def check(self) -> None:
        """Raise Interrupted if the user asked for an end; for work that is not cancelled midway."""
        if self._asked.is_set():
            raise Interrupted

    async def interruptible(self, work: Coroutine[Any, Any, T]) -> T:
        """Await work that may be cancelled at any moment.

        Raises:
            Interrupted: The user asked for an end first; the work is cancelled.
        """
        working = asyncio.ensure_future(work)
        asked = asyncio.ensure_future(self._asked.wait())
        try:
            await asyncio.wait((working, asked), return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            raise Interrupted
        finally:
            for task in (working, asked):
                task.cancel()
            await asyncio.gather(working, asked, return_exceptions=True)
