"""Finds tasks that kill the host they run on. Knows nothing of Ray.

When a host dies, every task with a call on it becomes a suspect. From then on, calls of suspects on
one host are made one at a time, alongside those of other tasks. A suspect is guilty when its host
has died during its calls twice, since no other suspect was running there either time. A host that
dies for another reason therefore costs no task, unless that happens in the same task's calls again
and again.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_ENOUGH = 2  # hosts that died during calls of one suspect


class PoisonTask(RuntimeError):
    """A task that kills the process it runs in, and is excluded."""


class HostGone(RuntimeError):
    """A host was dead before a call began on it."""


class Suspects:
    """Which tasks were at work when a host died.

    Args:
        log: Receives a line for each task that is excluded.
        timeout_s: How long a suspect waits for another one, in seconds.
    """

    def __init__(self, log: Callable[[str], None], timeout_s: float) -> None:
        self._log, self._timeout_s = log, timeout_s
        self._lock = threading.Lock()
        self._locks: defaultdict[tuple[str, int], threading.Lock] = defaultdict(threading.Lock)
        self._dead: set[tuple[str, int]] = set()
        self._suspects: dict[str, list[str]] = {}  # task -> hosts that died since
        self._guilty: dict[str, str] = {}

    @property
    def guilty(self) -> tuple[str, ...]:
        """Ids of the tasks that are excluded."""
        return tuple(self._guilty)

    @contextmanager
    def at_work(
        self, task_id: str, host: str, generation: int = 0
    ) -> Iterator[Callable[[str], None]]:
        """Surround a call of a task on a host.

        Args:
            task_id: Id of the task.
            host: Name of the host.
            generation: Number of hosts of that name before this one.

        Yields:
            A function to call, with the reason, if the host dies during the call.

        Raises:
            PoisonTask: If the task is excluded.
            HostGone: If the host is known to be dead, so that this call cannot have killed it.
            TimeoutError: If other suspects keep the host busy for too long.
        """
        if task_id in self._guilty:
            raise PoisonTask(f"task {task_id} is excluded: {self._guilty[task_id]}")
        slot = host, generation
        if task_id not in self._suspects:
            self._check(slot)
            yield lambda reason: self._suspect(task_id, slot)
            return
        lock = self._locks[slot]
        if not lock.acquire(timeout=self._timeout_s):
            raise TimeoutError(f"other suspects keep {host} busy")
        try:
            self._check(slot)
            yield lambda reason: self._blame(task_id, slot, reason)
        finally:
            lock.release()

    def _check(self, slot: tuple[str, int]) -> None:
        if slot in self._dead:
            raise HostGone(f"{slot[0]} is dead")

    def _suspect(self, task_id: str, slot: tuple[str, int]) -> None:
        with self._lock:
            self._dead.add(slot)
            self._suspects.setdefault(task_id, [])

    def _blame(self, task_id: str, slot: tuple[str, int], reason: str) -> None:
        with self._lock:
            self._dead.add(slot)
            ended = self._suspects[task_id]
            ended.append(f"{slot[0]}, {reason}")
            if len(ended) < _ENOUGH or task_id in self._guilty:
                return
            self._guilty[task_id] = f"it killed its host twice ({'; '.join(ended)})"
        self._log(f"task {task_id} is excluded: {self._guilty[task_id]}")
