"""Says what is stuck: which trajectory, in which turn, on which host, and since when.

It ends nothing; that is for the deadlines. It is there so that whoever watches a run need not wait
for them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass(eq=False, slots=True)
class _Wait:
    where: str
    since: float = field(default_factory=time.monotonic)
    host: str = "this process"
    is_told: bool = False


_CURRENT: ContextVar[_Wait | None] = ContextVar("tir_alp.run.watchdog", default=None)


def note_host(name: str) -> None:
    """Say who works on what the caller waits for. A thread needs the context of the caller."""
    if (wait := _CURRENT.get()) is not None:
        wait.host = name


class Watchdog:
    """Knows what episodes wait for.

    Args:
        after_s: A wait that is longer is worth a word, once.
        log: Told a sentence.
    """

    def __init__(self, after_s: float = 60.0, log: Callable[[str], None] = print) -> None:
        self._after_s, self._log = after_s, log
        self._waits: set[_Wait] = set()

    @contextmanager
    def waiting(self, where: str) -> Iterator[None]:
        """Hold while an episode waits; `where` names trajectory, turn and part."""
        wait = _Wait(where)
        token = _CURRENT.set(wait)
        self._waits.add(wait)
        try:
            yield
        finally:
            self._waits.discard(wait)
            _CURRENT.reset(token)

    def look(self) -> None:
        """Tell of waits that have become too long."""
        now = time.monotonic()
        for wait in sorted(self._waits, key=lambda wait: wait.since):
            if not wait.is_told and now - wait.since > self._after_s:
                wait.is_told = True
                self._log(f"stuck for {now - wait.since:.0f} s: {wait.where}, on {wait.host}")

    async def watch(self) -> None:
        """Look again and again; cancel it."""
        while True:
            await asyncio.sleep(self._after_s / 4)
            self.look()
