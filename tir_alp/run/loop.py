"""What the loops of reinforcement learning and of supervised fine-tuning have in common."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

from tir_alp.training.checkpoint_folder import Best, is_best, write_best

T = TypeVar("T")


class HasTrainer(Protocol):
    """A run whose trainer computes in a thread of its own."""

    @property
    def trainer_thread(self) -> ThreadPoolExecutor:
        """The one thread in which the trainer computes."""
        ...


async def with_trainer(run: HasTrainer, call: Callable[..., T], *arguments: Any) -> T:
    """Call the trainer in its thread; the answer may take long, or never come."""
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(run.trainer_thread, call, *arguments)


def due(step: int, every: int) -> bool:
    """Whether something that happens every `every` steps (0: never) happens after `step`."""
    return every > 0 and step % every == 0


async def keep_if_best(
    folder: Path, step: int, score: float, save: Callable[[], Awaitable[None]]
) -> None:
    """Note an evaluation that is better than all before, and see that its weights are saved.

    Args:
        folder: The run's folder of checkpoints.
        step: Number of steps made; the weights of step 0 are those that the run began with.
        score: Of the evaluation; higher is better.
        save: Writes the checkpoint of the step.
    """
    if is_best(folder, score):
        if step > 0 and not (folder / f"step_{step}").exists():
            await save()
        write_best(folder, Best(step, score))
