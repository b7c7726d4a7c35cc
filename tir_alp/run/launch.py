"""The stage of a run that starts processes: its trainer and its engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from tir_alp.engines.base import Engine
from tir_alp.roles import Placement, TrainerRole, ask_trainer_in
from tir_alp.run.prepare import Prepared


@dataclass(frozen=True, slots=True)
class Launched:
    """The trainer and the engine of a run, both with the weights that it goes on with.

    An engine that takes adapters starts with the model that the run began with, which they extend,
    and is given those of the trainer.
    """

    trainer: TrainerRole
    trainer_thread: ThreadPoolExecutor
    """The one thread in which the trainer computes, so that the event loop goes on meanwhile."""
    engine: Engine


@asynccontextmanager
async def launch(prepared: Prepared, placement: Placement) -> AsyncIterator[Launched]:
    """Start the trainer, then the engine; both end with the block.

    Raises:
        ValueError: For what a user can fix.
        RoleLost: One of them died in its start.
    """
    progress = prepared.progress
    async with AsyncExitStack() as stack:
        trainer = await placement.trainer(
            prepared.folder.path, prepared.initial_model, progress.checkpoint
        )
        stack.callback(trainer.close)
        thread = ThreadPoolExecutor(1, thread_name_prefix="trainer")
        stack.callback(thread.shutdown)
        takes_adapters = prepared.config.adapters is not None
        engine = await stack.enter_async_context(
            placement.engine(
                prepared.initial_model if takes_adapters else prepared.model_path,
                progress.position.step,
                prepared.renderer,
                ask_trainer_in(trainer, thread),
            )
        )
        if takes_adapters:
            loop = asyncio.get_running_loop()
            adapters = await loop.run_in_executor(thread, trainer.weights)
            await engine.load_weights(adapters, progress.position.step)
        yield Launched(trainer, thread, engine)
