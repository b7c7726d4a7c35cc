"""Memory that sessions share: who wants to run waits until the worst that it may do fits in."""

from __future__ import annotations

import asyncio
from collections import deque
from pathlib import Path

from tir_alp.tools.sandbox.result import SandboxError

_SHARE_OF_FREE = 0.75


class MemoryBudget:
    """A sum of reservations in megabytes, one an owner. First come, first served.

    An owner that nobody else stands beside always fits: a budget too small for one call would
    otherwise be a deadlock.
    """

    def __init__(self, total_mb: float, max_wait_s: float) -> None:
        self.total_mb = total_mb
        self._max_wait_s = max_wait_s
        self._reserved: dict[object, float] = {}
        self._waiting: deque[tuple[object, float, asyncio.Future[None]]] = deque()

    @property
    def reserved_mb(self) -> float:
        """The sum of all reservations."""
        return sum(self._reserved.values())

    async def reserve(self, owner: object, megabytes: float) -> None:
        """Raise the owner's reservation to this much, as soon as it fits.

        Raises:
            SandboxError: It did not fit in time.
        """
        if not self._waiting and self._fits(owner, megabytes):
            self._reserved[owner] = megabytes
            return
        turn = asyncio.get_running_loop().create_future()
        place = (owner, megabytes, turn)
        self._waiting.append(place)
        try:
            await asyncio.wait_for(turn, self._max_wait_s)
        except TimeoutError:
            raise SandboxError(
                f"no {megabytes:g} MB of the memory budget of {self.total_mb:g} MB became free "
                f"within {self._max_wait_s:g} s"
            ) from None
        finally:
            if place in self._waiting:
                self._waiting.remove(place)
                self._serve()  # who stood behind may fit

    def settle(self, owner: object, megabytes: float) -> None:
        """Set the owner's reservation to what it really holds; 0 ends it."""
        if megabytes > 0:
            self._reserved[owner] = megabytes
        else:
            self._reserved.pop(owner, None)
        self._serve()

    def _fits(self, owner: object, megabytes: float) -> bool:
        others = self.reserved_mb - self._reserved.get(owner, 0.0)
        return others + megabytes <= self.total_mb or others == 0.0

    def _serve(self) -> None:
        while self._waiting:
            owner, megabytes, turn = self._waiting[0]
            if not self._fits(owner, megabytes):
                return
            self._waiting.popleft()
            if not turn.done():
                self._reserved[owner] = megabytes
                turn.set_result(None)


def budget_of_this_machine() -> float:
    """Megabytes for all sessions together: a share of what is free now."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free_kb = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    return _SHARE_OF_FREE * free_kb / 1024
