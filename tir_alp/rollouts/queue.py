"""Groups in flight. The limit on staleness lives here and only here.

At most `(max_staleness + 1) * groups_per_step` groups are in flight or waiting to be trained on,
and they are taken in the order in which they were begun. A slot is freed when the weights that were
trained on its group are live in the engine. So the group that step s trains on was begun after the
weights of step s - max_staleness were live; with 0, after those of step s itself: exactly
synchronous, by the same code.

What a checkpoint needs to go on is `state`: which groups are pending, in their order, and those of
them whose episodes have all ended. The others of them begin again. So no task is lost, and none is
trained on twice.

With `hold` nothing is handed out while a group is in flight, so that every token of the group that
step s trains on was sampled by the weights of step s - max_staleness: exactly so stale.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from tir_alp.rollouts.data import Task
from tir_alp.types import TrajectoryGroup

HasSignal = Callable[[TrajectoryGroup], bool]
RunGroup = Callable[[Task, int], Awaitable[TrajectoryGroup]]


_MOST_LOST = 8  # groups in a row; more are taken for an outage, which waiting does not mend


class RolloutsFailed(Exception):
    """Nothing comes back any more: engine, environment or sandbox are down."""


@dataclass(frozen=True, slots=True)
class QueueState:
    """Order and contents of a queue between two steps.

    Example, 5 and 7 wait to be handed out, and only 7 has ended; 0 to 4 and 6 are done with:

        QueueState(next_group=8, pending=(5, 7), finished={7: group})
    """

    next_group: int = 0
    """The first group that has not been begun."""
    pending: tuple[int, ...] = ()
    """Groups that were begun, and neither trained on nor dropped; in order."""
    finished: Mapping[int, TrajectoryGroup] = field(default_factory=dict)
    """Those of them whose episodes have all ended."""

    @property
    def position(self) -> int:
        """The first group that is not done with."""
        return min((*self.pending, self.next_group))


class RolloutQueue:
    """Keeps groups in flight and hands them out in order.

    Args:
        run_group: Samples the group of a task, given the group's id.
        task_at: The task of a group id; a pure function of it, so that a position is one number.
        groups_per_step: Groups that a step takes.
        max_staleness: Steps that the weights behind a group may lag.
        hold: Whether they lag by exactly so many, once there are so many.
        state: Where a resumed run goes on.
        has_signal: Whether a group can teach anything.
        max_refills: Groups without signal that a step may replace by others.
    """

    replaced: tuple[TrajectoryGroup, ...]
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
        state: QueueState = QueueState(),
        has_signal: HasSignal = lambda _: True,
        max_refills: int = 0,
    ) -> None:
        self._hold = hold
        self._run_group, self._task_at = run_group, task_at
        self._groups_per_step = groups_per_step
        self._free = (max_staleness + 1) * groups_per_step
        self._in_flight: deque[tuple[int, asyncio.Future[TrajectoryGroup]]] = deque()
        self._resumed, self._finished = deque(state.pending), dict(state.finished)
        self._next_group = state.next_group
        self._has_signal, self._max_refills = has_signal, max_refills
        self.replaced = self.lost = ()

    @property
    def state(self) -> QueueState:
        """What a new queue needs to go on in the place of this one, between two steps."""
        finished = {
            group_id: group.result()
            for group_id, group in self._in_flight
            if group.done() and not group.cancelled() and group.exception() is None
        }
        # One that lost all its episodes has nothing to go on with, and gets another chance.
        finished = {group_id: group for group_id, group in finished.items() if group.trajectories}
        pending = [group_id for group_id, _ in self._in_flight]
        waiting = {each: self._finished[each] for each in self._resumed if each in self._finished}
        return QueueState(self._next_group, (*pending, *self._resumed), finished | waiting)

    async def take(self) -> list[TrajectoryGroup]:
        """Return the next `groups_per_step` groups, in order.

        Consumes free slots and tasks; waits for the oldest groups in flight. A group that lost all
        its episodes, and as long as `max_refills` allows one without signal, is skipped: its slot
        is used again at once, for another task. So the weights behind a group lag no more than
        without skipping. When no more may be replaced, groups without signal are returned too.
        A `take` that is cancelled or fails has handed out nothing: its groups are still pending.

        Raises:
            RolloutsFailed: If so many groups in a row are lost that it cannot be their tasks.
        """
        seen: list[tuple[int, asyncio.Future[TrajectoryGroup]]] = []
        self.replaced = self.lost = ()
        try:
            return await self._take(seen)
        except BaseException:
            self._in_flight.extendleft(reversed(seen))
            self._free -= len(self.replaced) + len(self.lost)
            self.replaced = self.lost = ()
            raise

    async def _take(
        self, seen: list[tuple[int, asyncio.Future[TrajectoryGroup]]]
    ) -> list[TrajectoryGroup]:
        """As `take`; what it takes out of those in flight is added to `seen`."""
        groups: list[TrajectoryGroup] = []
        num_lost = 0
        while len(groups) < self._groups_per_step:
            self._fill()
            if self._hold:
                await asyncio.wait([group for _, group in self._in_flight])
            group = await asyncio.shield(self._in_flight[0][1])
            seen.append(self._in_flight.popleft())
            if group.trajectories:
                num_lost = 0
                if len(self.replaced) == self._max_refills or self._has_signal(group):
                    groups.append(group)
                else:
                    self.replaced += (group,)
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
        groups = [group for _, group in self._in_flight]
        for group in groups:
            group.cancel()
        await asyncio.gather(*groups, return_exceptions=True)

    def _fill(self) -> None:
        while self._free > 0:
            if self._resumed:
                group_id = self._resumed.popleft()
            else:
                group_id, self._next_group = self._next_group, self._next_group + 1
            self._in_flight.append((group_id, self._begin(group_id)))
            self._free -= 1

    def _begin(self, group_id: int) -> asyncio.Future[TrajectoryGroup]:
        if (finished := self._finished.pop(group_id, None)) is None:
            return asyncio.ensure_future(self._run_group(self._task_at(group_id), group_id))
        ended = asyncio.get_running_loop().create_future()
        ended.set_result(finished)
        return ended
