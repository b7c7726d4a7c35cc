"""What sessions share: a call waits until the most that it may use fits into the budget."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass

from tir_alp.tools.sandbox.result import SandboxError


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """An amount of everything that can run out. Whole numbers, so that sums stay exact."""

    memory_mb: int = 0
    processes: int = 0
    """Includes threads, which the kernel counts as processes."""

    def __add__(self, other: Resources) -> Resources:
        return Resources(
            memory_mb=self.memory_mb + other.memory_mb, processes=self.processes + other.processes
        )

    def __sub__(self, other: Resources) -> Resources:
        return Resources(
            memory_mb=self.memory_mb - other.memory_mb, processes=self.processes - other.processes
        )


NOTHING = Resources()


class Budget:
    """A sum of reservations, one per owner. First come, first served.

    A single owner always fits: otherwise a budget that is too small for one call would be a
    deadlock.
    """

    def __init__(self, total: Resources, max_wait_s: float) -> None:
        self.total = total
        self.reserved = NOTHING
        """The sum of all reservations."""
        self._max_wait_s = max_wait_s
        self._reservations: dict[object, Resources] = {}
        self._waiting: deque[tuple[object, Resources, asyncio.Future[None]]] = deque()

    async def reserve(self, owner: object, amount: Resources) -> None:
        """Raise the owner's reservation to this amount, as soon as it fits.

        Raises:
            SandboxError: It did not fit in time.
        """
        if not self._waiting and not self._lack(owner, amount):
            self._set(owner, amount)
            return
        turn = asyncio.get_running_loop().create_future()
        entry = (owner, amount, turn)
        self._waiting.append(entry)
        try:
            async with asyncio.timeout(self._max_wait_s):  # `wait_for` can swallow a cancellation
                await turn
        except TimeoutError:
            lack = self._lack(owner, amount) or "room for those who came earlier"
            raise SandboxError(f"{lack} did not become free in {self._max_wait_s:g} s") from None
        finally:
            if entry in self._waiting:
                self._waiting.remove(entry)
                self._serve()  # those who came later may fit

    def settle(self, owner: object, amount: Resources) -> None:
        """Set the owner's reservation to what it actually holds; `NOTHING` ends it."""
        self._set(owner, amount)
        self._serve()

    def _set(self, owner: object, amount: Resources) -> None:
        self.reserved += amount - self._reservations.pop(owner, NOTHING)
        if amount != NOTHING:
            self._reservations[owner] = amount

    def _lack(self, owner: object, amount: Resources) -> str:
        """The part of this amount that does not fit, in words; empty if all of it fits."""
        others = self.reserved - self._reservations.get(owner, NOTHING)
        total = self.total
        if others.memory_mb and others.memory_mb + amount.memory_mb > total.memory_mb:
            return f"{amount.memory_mb} MB of the memory budget of {total.memory_mb} MB"
        if others.processes and others.processes + amount.processes > total.processes:
            return f"{amount.processes} processes of the process budget of {total.processes}"
        return ""

    def _serve(self) -> None:
        while self._waiting:
            owner, amount, turn = self._waiting[0]
            if self._lack(owner, amount):
                return
            self._waiting.popleft()
            if not turn.done():
                self._set(owner, amount)
                turn.set_result(None)
