"""Tasks that may have killed their host, and the proof. Knows nothing of Ray.

When a host dies, every task with a call on it is a suspect. From then on the calls of suspects on
one host are made one at a time, beside those of all others. A suspect whose host dies in its call
twice is guilty: no other suspect was at work there either time. A host that somebody else killed
costs no task so, unless that happens in the same task's calls again and again.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_ENOUGH = 2  # hosts that died in calls of a suspect


class PoisonTask(RuntimeError):
    """A task that ends whatever process it runs in."""


class HostGone(RuntimeError):
    """A host was dead before a call began on it."""


class Suspects:
    """Which tasks were at work when a host died.

    Args:
        log: Told, in a sentence, of a task that is dropped.
        timeout_s: How long a suspect waits for another one.
    """

    def __init__(self, log: Callable[[str], None], timeout_s: float) -> None:
        self._log, self._timeout_s = log, timeout_s
        self._lock = threading.Lock()
        self._locks: defaultdict[tuple[str, int], threading.Lock] = defaultdict(threading.Lock)
        self._dead: set[tuple[str, int]] = set()
        self._suspects: dict[str, list[str]] = {}  # task -> hosts that died in its calls since
        self._guilty: dict[str, str] = {}

    @property
    def guilty(self) -> tuple[str, ...]:
        """Tasks that are dropped."""
        return tuple(self._guilty)

    @contextmanager
    def at_work(
        self, task_id: str, host: str, generation: int = 0
    ) -> Iterator[Callable[[str], None]]:
        """Hold while a call of a task runs on a host; yields whom to tell if the host dies in it.

        Args:
            task_id: Of the task.
            host: Its name.
            generation: Hosts of that name before it.

        Raises:
            PoisonTask: If the task is dropped.
            HostGone: If the host is known to be dead: what begins on it then has not killed it.
            TimeoutError: If other suspects kept the host busy for too long.
        """
        if task_id in self._guilty:
            raise PoisonTask(f"task {task_id} is dropped: {self._guilty[task_id]}")
        place = host, generation
        if task_id not in self._suspects:
            self._check(place)
            yield lambda reason: self._suspect(task_id, place)
            return
        lock = self._locks[place]
        if not lock.acquire(timeout=self._timeout_s):
            raise TimeoutError(f"other suspects keep {host} busy")
        try:
            self._check(place)
            yield lambda reason: self._blame(task_id, place, reason)
        finally:
            lock.release()

    def _check(self, place: tuple[str, int]) -> None:
        if place in self._dead:
            raise HostGone(f"{place[0]} is dead")

    def _suspect(self, task_id: str, place: tuple[str, int]) -> None:
        with self._lock:
            self._dead.add(place)
            self._suspects.setdefault(task_id, [])

    def _blame(self, task_id: str, place: tuple[str, int], reason: str) -> None:
        with self._lock:
            self._dead.add(place)
            ended = self._suspects[task_id]
            ended.append(f"{place[0]}, {reason}")
            if len(ended) < _ENOUGH or task_id in self._guilty:
                return
            self._guilty[task_id] = f"it ended its host twice ({'; '.join(ended)})"
        self._log(f"task {task_id} is dropped: {self._guilty[task_id]}")
