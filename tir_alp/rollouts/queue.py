"""Groups in flight. Staleness is limited here and nowhere else.

At most `(max_staleness + 1) * groups_per_step` groups are in flight or waiting to be trained on,
and they are taken in the order in which they were started. A slot is freed when the weights that
were trained on its group are live in the engine. The group that step s trains on was therefore
started after the weights of step s - max_staleness were live. With `max_staleness` 0 these are the
weights of step s itself: exactly synchronous, by the same code.

A checkpoint stores `state`: the pending groups in their order, and the results of those whose
episodes have all ended. The others start again. No task is lost, and none is trained on twice.

With `hold`, no group is handed out while any is in flight. Every token of the group that step s
trains on was then sampled by the weights of step s - max_staleness: exactly that stale.
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

_MOST_LOST = 8  # groups in a row; more count as an outage, which waiting does not fix


class RolloutsFailed(Exception):
    """No group returns a trajectory any more: engine, environment or sandbox is down."""


@dataclass(frozen=True, slots=True)
class QueueState:
    """Order and contents of a queue between two steps.

    Example: groups 5 and 7 are pending, and only 7 has ended; 0 to 4 and 6 are done:

        QueueState(next_group=8, pending=(5, 7), finished={7: group})
    """

    next_group: int = 0
    """Id of the first group that has not been started."""
    pending: tuple[int, ...] = ()
    """Ids of the groups that were started and neither trained on nor dropped, in order."""
    finished: Mapping[int, TrajectoryGroup] = field(default_factory=dict)
    """Results of the pending groups whose episodes have all ended, by id."""

    @property
    def position(self) -> int:
        """Id of the first group that is not done."""
        return min((*self.pending, self.next_group))


class RolloutQueue:
    """Keeps groups in flight and hands them out in order.

    Args:
        run_group: Samples the group for a task and a group id.
        task_at: Returns the task for a group id; a pure function, so that a position is one number.
        groups_per_step: Number of groups that a step takes.
        max_staleness: Number of steps by which the weights that sampled a group may lag.
        hold: Whether they lag by exactly `max_staleness` steps, once a run has made that many.
        state: State to continue from, in a resumed run.
        has_signal: Whether a group can teach anything.
        max_refills: Number of groups without signal that a step may replace.
    """

    replaced: tuple[TrajectoryGroup, ...]
    """Groups without signal that the last `take` replaced."""
    lost: tuple[TrajectoryGroup, ...]
    """Groups that the last `take` skipped because all their episodes had failed."""

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
        """The state from which a new queue can continue; valid between two steps."""
        finished = {
            group_id: group.result()
            for group_id, group in self._in_flight
            if group.done() and not group.cancelled() and group.exception() is None
        }
        # A group that lost all its episodes has no results to keep: it starts again.
        finished = {group_id: group for group_id, group in finished.items() if group.trajectories}
        pending = [group_id for group_id, _ in self._in_flight]
        waiting = {each: self._finished[each] for each in self._resumed if each in self._finished}
        return QueueState(self._next_group, (*pending, *self._resumed), finished | waiting)

    async def take(self) -> list[TrajectoryGroup]:
        """Return the next `groups_per_step` groups, in order.

        Consumes free slots and tasks; waits for the oldest groups in flight. A group is skipped if
        it lost all its episodes, or if it has no signal and `max_refills` allows another
        replacement. The slot of a skipped group is used for another task at once, so skipping does
        not increase staleness. After `max_refills` replacements, groups without signal are returned
        too. A `take` that is cancelled or fails hands out nothing: its groups are still pending.

        Raises:
            RolloutsFailed: More groups in a row were lost than their tasks could explain.
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
        """Do the work of `take`; every group removed from those in flight is added to `seen`."""
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
        """Cancel the groups in flight."""
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
        result = asyncio.get_running_loop().create_future()
        result.set_result(finished)
        return result
