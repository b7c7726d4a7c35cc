"""Reports waits that take long: which trajectory, in which turn, on which host, since when.

It ends nothing; deadlines do that. It lets the person who watches a run know before they pass.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass(eq=False, slots=True)
class _Wait:
    where: str
    since: float = field(default_factory=time.monotonic)
    host: str = "this process"
    is_reported: bool = False


_CURRENT: ContextVar[_Wait | None] = ContextVar("tir_alp.run.watchdog", default=None)


def note_host(name: str) -> None:
    """Name the host that works for the caller; a thread needs the context of its caller."""
    if (wait := _CURRENT.get()) is not None:
        wait.host = name


class Watchdog:
    """Keeps track of what episodes wait for.

    Args:
        after_s: Waits that are longer, in seconds, are reported once.
        log: Called with a sentence about each such wait.
    """

    def __init__(self, after_s: float = 60.0, log: Callable[[str], None] = print) -> None:
        self._after_s, self._log = after_s, log
        self._waits: set[_Wait] = set()

    @contextmanager
    def waiting(self, where: str) -> Iterator[None]:
        """Hold while an episode waits; `where` names trajectory, turn and what it waits for."""
        wait = _Wait(where)
        token = _CURRENT.set(wait)
        self._waits.add(wait)
        try:
            yield
        finally:
            self._waits.discard(wait)
            _CURRENT.reset(token)

    def look(self) -> None:
        """Report the waits that have become too long: one line for all that wait for the same."""
        now = time.monotonic()
        late: defaultdict[tuple[str, str], list[_Wait]] = defaultdict(list)
        for wait in sorted(self._waits, key=lambda wait: wait.since):
            if not wait.is_reported and now - wait.since > self._after_s:
                wait.is_reported = True
                late[wait.where.rpartition(": ")[2], wait.host].append(wait)
        for (_, host), (first, *others) in late.items():
            line = f"stuck for {now - first.since:.0f} s: {first.where}, on {host}"
            self._log(line + (f"; and {len(others)} others" if others else ""))

    async def watch(self) -> None:
        """Call `look` periodically until it is cancelled."""
        while True:
            await asyncio.sleep(self._after_s / 4)
            self.look()
