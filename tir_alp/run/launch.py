"""The stage of a run that starts processes: its trainer and its engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from tir_alp.engines.base import Engine
from tir_alp.roles import Placement, TrainerRole, ask_trainer_in
from tir_alp.run.prepare import Prepared


@dataclass(frozen=True, slots=True)
class Launched:
    """The trainer and the engine of a run, both with the weights that it goes on with."""

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
        engine = await stack.enter_async_context(
            placement.engine(
                prepared.model_path,
                progress.position.step,
                prepared.renderer,
                ask_trainer_in(trainer, thread),
            )
        )
        yield Launched(trainer, thread, engine)
