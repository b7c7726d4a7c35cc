"""Accuracy on held-out tasks, through the same episodes as training."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from tir_alp.algorithm.metrics import evaluation_metrics
from tir_alp.rollouts.data import Task
from tir_alp.rollouts.episode import EpisodeFailed, EpisodeRunner
from tir_alp.types import Trajectory


async def evaluate(
    runner: EpisodeRunner, tasks: Sequence[Task], *, samples: int, greedy: bool
) -> dict[str, float]:
    """Sample `samples` trajectories per task and, if `greedy`, play a greedy one as well.

    The draws depend only on the task's position and the runner's seed, so that two policies are
    compared on the same draws. An episode that infrastructure broke is left out and counted.
    """

    async def play(index: int, temperature: float | None) -> Trajectory | None:
        try:
            task = tasks[index % len(tasks)]
            return await runner.run_episode(task, index % len(tasks), index, temperature)
        except EpisodeFailed as failure:
            runner.on_failure(failure)
            return None

    num_sampled = len(tasks) * samples
    num_all = num_sampled + (len(tasks) if greedy else 0)
    played = await asyncio.gather(
        *(play(index, None if index < num_sampled else 0.0) for index in range(num_all))
    )
    sampled = [
        [each for each in played[task : num_sampled : len(tasks)] if each is not None]
        for task in range(len(tasks))
    ]
    best = [each for each in played[num_sampled:] if each is not None]
    failed = sum(trajectory is None for trajectory in played)
    return {**evaluation_metrics(sampled, best), "eval/failed": failed}
