"""Plays tasks to measure a policy, through the same episodes as training.

Draws depend on the set, the position of the task in it and the number of the sample, and on nothing
else: two policies are compared on the same draws, and more samples extend fewer ones.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from tir_alp.algorithm.metrics import evaluation_metrics
from tir_alp.rollouts.data import EvalSet, Task
from tir_alp.rollouts.episode import EpisodeFailed, EpisodeRunner
from tir_alp.types import Trajectory

UIDS_PER_TASK = 1 << 12
"""Sequences that one task can have; the last one is the greedy one."""

_TASKS_PER_SET = 1 << 26


@dataclass(frozen=True, slots=True)
class PlayedTask:
    """What became of one task."""

    group_id: int
    """Identity of the task within the evaluation; see `group_id_of`."""
    task_id: str
    sampled: tuple[Trajectory, ...]
    """Sampled trajectories, without those that infrastructure broke."""
    greedy: Trajectory | None = None
    """The greedy trajectory, if there was to be one and it did not fail."""
    num_failed: int = 0
    """Episodes that infrastructure broke. They are no wrong answers: they are left out."""


def group_id_of(name: str, index: int) -> int:
    """Return the identity of a task: of the set by its name, and of its position in the set."""
    return (zlib.crc32(name.encode()) % 2**16 if name else 0) * _TASKS_PER_SET + index


async def play_task(
    runner: EpisodeRunner, task: Task, group_id: int, samples: int, greedy: bool
) -> PlayedTask:
    """Sample a task a number of times and, if asked, play it greedily as well.

    Args:
        runner: Plays the episodes.
        task: The task.
        group_id: Its identity, on which the draws depend.
        samples: Number of sampled trajectories, less than `UIDS_PER_TASK`.
        greedy: Whether to play a greedy one.
    """

    async def play(number: int, temperature: float | None) -> Trajectory | None:
        try:
            uid = group_id * UIDS_PER_TASK + number
            return await runner.run_episode(task, group_id, uid, temperature)
        except EpisodeFailed as failure:
            runner.on_failure(failure)
            return None

    draws: list[tuple[int, float | None]] = [(number, None) for number in range(samples)]
    if greedy:
        draws.append((UIDS_PER_TASK - 1, 0.0))
    played = await asyncio.gather(*(play(*draw) for draw in draws))
    return PlayedTask(
        group_id=group_id,
        task_id=task.task_id,
        sampled=tuple(each for each in played[:samples] if each is not None),
        greedy=played[samples] if greedy else None,
        num_failed=sum(each is None for each in played),
    )


async def play_sets(
    runner: EpisodeRunner,
    sets: Sequence[EvalSet],
    *,
    samples: int,
    greedy: bool,
    done: Mapping[int, PlayedTask] | None = None,
    on_played: Callable[[PlayedTask], Awaitable[None]] | None = None,
) -> dict[str, list[PlayedTask]]:
    """Play all tasks of all sets.

    Args:
        runner: Plays the episodes, as many at a time as it has slots.
        sets: The tasks.
        samples: Sampled trajectories per task.
        greedy: Whether to play a greedy one per task as well.
        done: Tasks that were played before, by `group_id`; they are not played again.
        on_played: Called with each task as soon as it is played.

    Returns:
        The played tasks of each set, in the order of its tasks, by the set's name.
    """
    before = done or {}

    async def played(name: str, index: int, task: Task) -> PlayedTask:
        group_id = group_id_of(name, index)
        if group_id in before:
            return before[group_id]
        one = await play_task(runner, task, group_id, samples, greedy)
        if on_played is not None:
            await on_played(one)
        return one

    results = await asyncio.gather(
        *(
            asyncio.gather(
                *(played(each.name, index, task) for index, task in enumerate(each.tasks))
            )
            for each in sets
        )
    )
    return {each.name: list(tasks) for each, tasks in zip(sets, results, strict=True)}


def summary(played: Mapping[str, Sequence[PlayedTask]]) -> dict[str, float]:
    """Return the metrics of an evaluation: of all tasks together, and of each named set.

    Args:
        played: The played tasks by the set's name; see `evaluation_metrics`.
    """
    metrics = _metrics([each for tasks in played.values() for each in tasks])
    for name, tasks in played.items():
        if name:
            own = _metrics(tasks).items()
            metrics |= {f"eval/{name}/{key.removeprefix('eval/')}": value for key, value in own}
    return metrics


def _metrics(tasks: Sequence[PlayedTask]) -> dict[str, float]:
    greedy = [each.greedy for each in tasks if each.greedy is not None]
    metrics = evaluation_metrics([each.sampled for each in tasks], greedy)
    return {**metrics, "eval/failed": sum(each.num_failed for each in tasks)}
