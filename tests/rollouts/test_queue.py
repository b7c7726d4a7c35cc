"""The queue: how many groups are in flight, the order they come out in, how stale they can be."""

import asyncio
import json
import random
from collections.abc import Callable
from typing import Any

import pytest

from tir_alp.records.trajectories import state_from_record, state_to_record
from tir_alp.rollouts.data import Task
from tir_alp.rollouts.queue import RolloutQueue, RolloutsFailed
from tir_alp.tools.outcome import Outcome
from tir_alp.types import StopReason, TokenSpan, Trajectory, TrajectoryGroup, Turn


def task_at(position: int) -> Task:
    return Task(f"t{position}", "q", "a")


def group(task: Task, group_id: int, version: int = 0, num_trajectories: int = 1):
    turn = Turn(TokenSpan((1,), (0.0,)), TokenSpan(()), version, StopReason.EOS, Outcome.OK, 0.0)
    trajectory = Trajectory(task.task_id, group_id, TokenSpan((1,)), (turn,), True, False)
    return TrajectoryGroup(task.task_id, group_id, (trajectory,) * num_trajectories)


class Sampler:
    """Starts a group for each call, and finishes each on request."""

    def __init__(self, dead: frozenset[int] = frozenset()):
        self.begun: list[int] = []
        self.cancelled: list[int] = []
        self.dead = dead
        self._ends: dict[int, asyncio.Event] = {}

    async def __call__(self, task: Task, group_id: int) -> TrajectoryGroup:
        assert task == task_at(group_id)
        self.begun.append(group_id)
        try:
            await self._end(group_id).wait()
        except asyncio.CancelledError:
            self.cancelled.append(group_id)
            raise
        return group(task, group_id, num_trajectories=0 if group_id in self.dead else 1)

    def end(self, *group_ids: int) -> None:
        for group_id in group_ids:
            self._end(group_id).set()

    def _end(self, group_id: int) -> asyncio.Event:
        return self._ends.setdefault(group_id, asyncio.Event())


class TimedSampler:
    """Finishes its groups after random pauses; each has the policy version of its start."""

    def __init__(self, seed: int, pauses: list[float]):
        self.version = self.most_in_flight = self._in_flight = 0
        self._rng, self._pauses = random.Random(seed), pauses

    async def __call__(self, task: Task, group_id: int) -> TrajectoryGroup:
        begun_with = self.version
        self._in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self._in_flight)
        await asyncio.sleep(self._rng.choice(self._pauses))
        self._in_flight -= 1
        return group(task, group_id, begun_with)


def queue_of(run_group: Any, **settings: Any) -> RolloutQueue:
    all_settings: dict[str, Any] = {"groups_per_step": 2} | settings
    return RolloutQueue(run_group, task_at, **all_settings)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def ids(groups: list[TrajectoryGroup]) -> list[int]:
    return [each.group_id for each in groups]


def run(body: Callable[[], Any]) -> Any:
    async def limited() -> Any:
        async with asyncio.timeout(20):
            return await body()

    return asyncio.run(limited())


# ------------------------------------------------------------------------------------ capacity


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
def test_no_more_groups_are_started_than_the_capacity(max_staleness):
    async def body() -> None:
        sampler = Sampler()
        queue = queue_of(sampler, max_staleness=max_staleness)
        taking = asyncio.create_task(queue.take())
        await settle()
        capacity = (max_staleness + 1) * 2
        assert sampler.begun == list(range(capacity))
        sampler.end(*range(100))
        assert ids(await taking) == [0, 1]
        await settle()
        assert sampler.begun == list(
            range(capacity)
        )  # a group that was taken is not yet trained on
        queue.release()
        await settle()
        assert sampler.begun == list(range(capacity + 2))

    run(body)


def test_with_staleness_zero_nothing_begins_before_the_weights_are_live():
    async def body() -> None:
        sampler = Sampler()
        queue = queue_of(sampler)
        sampler.end(*range(100))
        for step in range(4):
            assert ids(await queue.take()) == [2 * step, 2 * step + 1]
            await settle()
            assert sampler.begun == list(range(2 * step + 2))
            queue.release()

    run(body)


@pytest.mark.parametrize("max_staleness", [0, 1, 2, 5])
def test_no_group_is_staler_than_allowed_whatever_the_durations(max_staleness):
    """The policy version advances by one per step; a group has the version of its start."""
    rng = random.Random(max_staleness)
    sampler = TimedSampler(max_staleness, [0, 0, 0.001, 0.01])

    async def body() -> list[int]:
        staleness = []
        queue = queue_of(sampler, max_staleness=max_staleness, groups_per_step=3)
        for step in range(12):
            groups = await queue.take()
            staleness += [step - each.trajectories[0].turns[0].policy_version for each in groups]
            await asyncio.sleep(rng.choice([0, 0.005]))
            sampler.version = step + 1
            queue.release()
        await queue.close()
        return staleness

    staleness = run(body)
    assert max(staleness) == max_staleness
    assert sampler.most_in_flight <= (max_staleness + 1) * 3


# --------------------------------------------------------------------------------------- order


def test_groups_are_taken_in_the_order_in_which_they_were_begun():
    async def body() -> None:
        sampler = Sampler()
        queue = queue_of(sampler, max_staleness=1)
        taking = asyncio.create_task(queue.take())
        await settle()
        sampler.end(3, 2, 1)
        await settle()
        assert not taking.done()
        sampler.end(0)
        assert ids(await taking) == [0, 1]
        assert ids(await queue.take()) == [2, 3]

    run(body)


def test_a_group_that_lost_all_its_episodes_is_replaced_at_once():
    async def body() -> None:
        sampler = Sampler(dead=frozenset({1, 2}))
        sampler.end(*range(100))
        queue = queue_of(sampler)
        assert ids(await queue.take()) == [0, 3]
        assert [group.group_id for group in queue.lost] == [1, 2]
        assert queue.state.position == 4
        queue.release()
        assert ids(await queue.take()) == [4, 5]
        assert queue.lost == ()

    run(body)


def test_an_outage_ends_the_waiting():
    async def body() -> None:
        sampler = Sampler(dead=frozenset(range(1, 100)))
        sampler.end(*range(100))
        with pytest.raises(RolloutsFailed, match="the last 9 groups lost all their episodes"):
            await queue_of(sampler).take()

    run(body)


def test_a_resumed_queue_neither_loses_nor_repeats_a_group():
    """Groups 3 and 5 have ended and are not sampled again; 4 was in flight, and starts again."""

    async def body() -> None:
        sampler = Sampler()
        first = queue_of(sampler, max_staleness=2)
        taking = asyncio.create_task(first.take())
        await settle()
        sampler.end(0, 1, 3, 5)
        assert ids(await taking) == [0, 1]
        taking = asyncio.create_task(first.take())
        first.release()
        await settle()
        sampler.end(2)
        await settle()  # 2 and 3 are chosen; 4 to 7 are in flight
        assert ids(await taking) == [2, 3]
        taking = asyncio.create_task(first.take())
        await settle()
        taking.cancel()
        state = first.state
        assert (state.next_group, state.pending, list(state.finished)) == (8, (4, 5, 6, 7), [5])
        state = state_from_record(json.loads(json.dumps(state_to_record(state))))
        later = Sampler()
        later.end(*range(100))
        second = queue_of(later, max_staleness=2, state=state)
        assert [ids(await second.take()) for _ in range(3)] == [[4, 5], [6, 7], [8, 9]]
        assert later.begun == [4, 6, 7, 8, 9]

    run(body)


def test_a_take_that_is_cancelled_has_handed_out_nothing():
    async def body() -> None:
        sampler = Sampler()
        queue = queue_of(sampler)
        taking = asyncio.create_task(queue.take())
        await settle()
        sampler.end(0)
        await settle()
        taking.cancel()
        await asyncio.wait([taking])
        assert queue.state.pending == (0, 1) and list(queue.state.finished) == [0]
        sampler.end(1)
        assert ids(await queue.take()) == [0, 1]
        assert sampler.cancelled == []

    run(body)


# ------------------------------------------------------------------------ groups without signal


def signal_in(*group_ids: int) -> Callable[[TrajectoryGroup], bool]:
    return lambda group: group.group_id in group_ids


def test_a_group_without_signal_is_replaced_by_another_task_and_not_by_a_copy():
    async def body() -> None:
        sampler = Sampler()
        sampler.end(*range(100))
        queue = queue_of(sampler, has_signal=signal_in(1, 4, 5, 6), max_refills=3)
        assert ids(await queue.take()) == [1, 4]
        assert [group.group_id for group in queue.replaced] == [0, 2, 3]
        assert queue.state.position == 5
        assert sampler.begun == [0, 1, 2, 3, 4]
        queue.release()
        assert ids(await queue.take()) == [5, 6]
        assert queue.replaced == ()

    run(body)


@pytest.mark.parametrize("max_refills", [0, 1, 5])
def test_a_step_ends_even_if_no_group_has_signal(max_refills):
    async def body() -> None:
        sampler = Sampler()
        sampler.end(*range(100))
        queue = queue_of(sampler, has_signal=signal_in(), max_refills=max_refills)
        assert ids(await queue.take()) == [max_refills, max_refills + 1]
        assert len(queue.replaced) == max_refills

    run(body)


def test_groups_that_lost_all_their_episodes_use_up_no_refill():
    async def body() -> None:
        sampler = Sampler(dead=frozenset({0, 2}))
        sampler.end(*range(100))
        queue = queue_of(sampler, has_signal=signal_in(3, 4), max_refills=1)
        assert ids(await queue.take()) == [3, 4]
        assert [group.group_id for group in queue.replaced] == [1]

    run(body)


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
def test_refilling_makes_no_group_staler_and_puts_no_more_in_flight(max_staleness):
    sampler = TimedSampler(max_staleness, [0, 0, 0.001, 0.005])

    async def body() -> tuple[list[int], int]:
        staleness, num_failed = [], 0
        queue = queue_of(
            sampler,
            max_staleness=max_staleness,
            groups_per_step=3,
            has_signal=lambda group: group.group_id % 3 == 0,
            max_refills=4,
        )
        for step in range(12):
            groups = await queue.take()
            staleness += [step - each.trajectories[0].turns[0].policy_version for each in groups]
            num_failed += len(queue.replaced)
            sampler.version = step + 1
            queue.release()
        await queue.close()
        return staleness, num_failed

    staleness, num_failed = run(body)
    assert max(staleness) <= max_staleness
    assert sampler.most_in_flight <= (max_staleness + 1) * 3
    assert num_failed > 12


# ------------------------------------------------------------------------------ failure and end


def test_an_error_reaches_the_caller_of_take():
    async def run_group(task: Task, group_id: int) -> TrajectoryGroup:
        raise ZeroDivisionError

    async def body() -> None:
        queue = queue_of(run_group)
        with pytest.raises(ZeroDivisionError):
            await queue.take()
        await queue.close()

    run(body)


def test_closing_cancels_what_is_in_flight():
    async def body() -> None:
        sampler = Sampler()
        queue = queue_of(sampler, max_staleness=1)
        sampler.end(0, 1)
        await queue.take()
        await queue.close()
        assert sampler.cancelled == [2, 3]

    run(body)


def test_a_queue_that_holds_hands_nothing_out_while_a_group_is_in_flight():
    async def scenario():
        sampler = Sampler()
        queue = queue_of(sampler, max_staleness=1, hold=True)
        taking = asyncio.create_task(queue.take())
        await settle()
        sampler.end(0, 1, 2)
        await settle()
        assert not taking.done()  # groups 0 and 1 have ended, but 3 would see the next weights
        sampler.end(3)
        assert [each.group_id for each in await taking] == [0, 1]
        queue.release()
        await settle()
        assert sampler.begun == [0, 1, 2, 3, 4, 5]
        taking = asyncio.create_task(queue.take())
        await settle()
        assert not taking.done()  # 2 and 3 wait until 4 and 5 have been sampled by these weights
        sampler.end(4, 5)
        assert [each.group_id for each in await taking] == [2, 3]

    asyncio.run(scenario())


def test_weights_lag_by_exactly_the_staleness_that_is_held():
    async def scenario() -> list[set[int]]:
        version = 0

        async def run_group(task: Task, group_id: int) -> TrajectoryGroup:
            await asyncio.sleep(random.uniform(0, 0.01))
            return group(task, group_id, version)

        queue, lags = queue_of(run_group, max_staleness=2, hold=True), []
        for step in range(6):
            groups = await queue.take()
            turns = [turn for each in groups for one in each.trajectories for turn in one.turns]
            lags.append({step - turn.policy_version for turn in turns})
            version += 1
            queue.release()
        await queue.close()
        return lags

    assert asyncio.run(scenario()) == [{0}, {1}, {2}, {2}, {2}, {2}]
