"""Groups in flight. The limit on staleness lives here and only here.

At most `(max_staleness + 1) * groups_per_step` groups are in flight or waiting to be trained on,
and they are taken in the order in which they were begun. A slot is freed when the weights that were
trained on its group are live in the engine. So the group that step s trains on was begun after the
weights of step s - max_staleness were live; with 0, after those of step s itself: exactly
synchronous, by the same code.

With `hold` nothing is handed out while a group is in flight, so that every token of the group that
step s trains on was sampled by the weights of step s - max_staleness: exactly so stale.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

from tir_alp.data import Task
from tir_alp.types import TrajectoryGroup

HasSignal = Callable[[TrajectoryGroup], bool]
RunGroup = Callable[[Task, int], Awaitable[TrajectoryGroup]]


_MOST_LOST = 8  # groups in a row; more are taken for an outage, which waiting does not mend


class RolloutsFailed(Exception):
    """Nothing comes back any more: engine, environment or sandbox are down."""


class RolloutQueue:
    """Keeps groups in flight and hands them out in order.

    Args:
        run_group: Samples the group of a task, given the group's id.
        task_at: The task of a group id; a pure function of it, so that a position is one number.
        groups_per_step: Groups that a step takes.
        max_staleness: Steps that the weights behind a group may lag.
        hold: Whether they lag by exactly so many, once there are so many.
        next_group: First group id; where a resumed run goes on.
        has_signal: Whether a group can teach anything.
        max_refills: Groups without signal that a step may replace by others.
    """

    dropped: tuple[TrajectoryGroup, ...]
    """Groups without signal that the last `take` replaced."""
    lost: tuple[TrajectoryGroup, ...]
    """Groups that the last `take` skipped, since all their episodes had failed."""

    def __init__(
        self,
        run_group: RunGroup,
        task_at: Callable[[int], Task],
        *,
        groups_per_step: int,
        max_staleness: int = 0,
        hold: bool = False,
        next_group: int = 0,
        has_signal: HasSignal = lambda _: True,
        max_refills: int = 0,
    ) -> None:
        self._hold = hold
        self._run_group, self._task_at = run_group, task_at
        self._groups_per_step = groups_per_step
        self._free = (max_staleness + 1) * groups_per_step
        self._in_flight: deque[asyncio.Task[TrajectoryGroup]] = deque()
        self._started = self._taken = next_group
        self._has_signal, self._max_refills = has_signal, max_refills
        self.dropped = self.lost = ()

    @property
    def position(self) -> int:
        """Groups taken so far. A run that resumes here begins again those that were in flight."""
        return self._taken

    async def take(self) -> list[TrajectoryGroup]:
        """Return the next `groups_per_step` groups, in order.

        Consumes free slots and tasks; waits for the oldest groups in flight. A group that lost all
        its episodes, and as long as `max_refills` allows one without signal, is skipped: its slot
        is used again at once, for another task. So the weights behind a group lag no more than
        without skipping. When no more may be replaced, groups without signal are returned too.

        Raises:
            RolloutsFailed: If so many groups in a row are lost that it cannot be their tasks.
        """
        groups: list[TrajectoryGroup] = []
        self.dropped = self.lost = ()
        num_lost = 0
        while len(groups) < self._groups_per_step:
            self._fill()
            if self._hold:
                await asyncio.wait(self._in_flight)
            group = await self._in_flight[0]
            self._in_flight.popleft()
            self._taken += 1
            if group.trajectories:
                num_lost = 0
                if len(self.dropped) == self._max_refills or self._has_signal(group):
                    groups.append(group)
                else:
                    self.dropped += (group,)
                    self._free += 1
                continue
            self._free += 1
            self.lost += (group,)
            num_lost += 1
            if num_lost > max(_MOST_LOST, self._groups_per_step):
                raise RolloutsFailed(
                    f"the last {num_lost} groups lost all their episodes, the last one on task "
                    f"{group.task_id}: the failures are listed above"
                )
        return groups

    def release(self) -> None:
        """Free the slots of one step: the weights trained on its groups are live."""
        self._free += self._groups_per_step
        self._fill()

    async def close(self) -> None:
        """Cancel what is in flight."""
        for group in self._in_flight:
            group.cancel()
        await asyncio.gather(*self._in_flight, return_exceptions=True)

    def _fill(self) -> None:
        while self._free > 0:
            group = self._run_group(self._task_at(self._started), self._started)
            self._in_flight.append(asyncio.ensure_future(group))
            self._free -= 1
            self._started += 1
