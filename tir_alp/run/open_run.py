"""Opens a run in four stages, and closes it again.

    prepare   reads config, checkpoint, tokenizer and tasks; starts nothing     (prepare.py)
    check     examines machine, environment and chat template                   (StartChecks)
    launch    starts trainer and engine, which are then checked against         (launch.py)
              each other
    collect   makes the run's folder, ledger and rollout queue                  (here)

Nothing is written before `collect`, so a run that cannot start leaves nothing behind.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import gymnasium

from tir_alp.algorithm.advantage import group_advantages, has_signal
from tir_alp.config import Config
from tir_alp.engines.base import Engine
from tir_alp.records.folder import RunFolder
from tir_alp.records.ledger import Ledger
from tir_alp.records.readable import reading
from tir_alp.roles import Node, Placement, TrainerRole
from tir_alp.rollouts.data import EvalSet
from tir_alp.rollouts.episode import EpisodeRunner
from tir_alp.rollouts.queue import RolloutQueue
from tir_alp.run.advice import Advice
from tir_alp.run.console import RunConsole
from tir_alp.run.data_fingerprint import write_fingerprints
from tir_alp.run.episodes import open_episodes
from tir_alp.run.interrupt import Interrupt
from tir_alp.run.launch import Launched, launch
from tir_alp.run.prepare import Prepared, prepare
from tir_alp.training.checkpoint_folder import Position

EVALUATION_SEED = 1 << 32
"""Is added to the run's seed for the draws of evaluations."""


@dataclass(frozen=True, slots=True)
class Examined:
    """The outcome of the checks that need no weights; none of them failed."""

    environment_report: dict[str, Any]
    """The environment's own description of where it runs; see `doctor.check_environment`."""
    warnings: Sequence[str] = ()
    """Checks that failed and are ignored, in sentences."""
    prompts: Sequence[str] = ()
    """Texts of a few tasks."""


class StartChecks(Protocol):
    """Examines a run before it begins; raises ValueError where it would not be sound."""

    def before_launch(
        self,
        prepared: Prepared,
        make_env: Callable[[], gymnasium.Env[str, str]],
        nodes: Sequence[Node],
    ) -> Examined:
        """Check what needs no weights; blocks.

        Args:
            prepared: The run.
            make_env: Makes an environment.
            nodes: See `Placement.nodes`.
        """
        ...

    async def after_launch(
        self, prepared: Prepared, launched: Launched, prompts: Sequence[str]
    ) -> Sequence[str]:
        """Check engine and trainer against each other; returns warnings, in sentences."""
        ...


@dataclass(frozen=True, slots=True)
class Run:
    """A run, ready to go."""

    config: Config
    position: Position
    examined: Examined
    console: RunConsole
    folder: RunFolder
    engine: Engine
    trainer: TrainerRole
    interrupt: Interrupt
    rollouts: RolloutQueue
    ledger: Ledger
    evaluation: EpisodeRunner
    eval_sets: Sequence[EvalSet]
    trainer_thread: ThreadPoolExecutor
    """See `Launched`."""
    advice: Advice


@asynccontextmanager
async def open_run(
    config: Config,
    placement: Placement,
    checks: StartChecks,
    *,
    resume: Path | None = None,
    interrupt: Interrupt | None = None,
    examined: Examined | None = None,
) -> AsyncIterator[Run]:
    """Open a run, new or from the newest whole checkpoint of the folder `resume`.

    Args:
        config: Config of the run.
        placement: Where its trainer, engine and environments live.
        checks: Made before the run begins.
        resume: Folder of a run to go on with.
        interrupt: Shared with the run before it.
        examined: From the same run when it was open before, in the same placement: it passed all
            checks then, and is not examined again.

    Raises:
        ValueError: For what a user can fix; nothing has been written then.
    """
    console = RunConsole()
    console.print(f"reading the model {config.model.path!r}, the tasks and the environment")
    # In threads, not in the event loop: that is where actors which are lost meanwhile get replaced.
    prepared = await asyncio.to_thread(prepare, config, resume, console.print)
    is_new = examined is None
    if examined is None:
        console.print("checking this machine, the environment and the chat template")
        examined = await asyncio.to_thread(
            checks.before_launch, prepared, placement.make_env, placement.nodes()
        )
    console.print("starting trainer and engine")
    async with AsyncExitStack() as stack:
        launched = await stack.enter_async_context(launch(prepared, placement))
        if is_new:
            later = await checks.after_launch(prepared, launched, examined.prompts)
            for each in (*examined.warnings, *later):
                console.print(f"warning: {each}")
        yield collect(
            prepared, launched, examined, placement, console, interrupt or Interrupt(), stack
        )


def collect(
    prepared: Prepared,
    launched: Launched,
    examined: Examined,
    placement: Placement,
    console: RunConsole,
    interrupt: Interrupt,
    stack: AsyncExitStack,
) -> Run:
    """Make the folder, the ledger and the rollout queue; `stack` closes them."""
    config, rollout = prepared.config, prepared.config.rollout
    ledger = Ledger(rollout.group_size)
    ledger.restore(prepared.progress.attempts)
    _open_folder(prepared, examined, console.print)
    stack.enter_context(closing(prepared.folder))

    num_episodes = (rollout.max_staleness + 1) * rollout.groups_per_step * rollout.group_size
    runner = open_episodes(
        stack,
        config,
        num_episodes,
        placement.make_env,
        prepared.renderer,
        console.print,
        LeftOut(prepared, console).add,
    )
    generate = launched.engine.generate
    recorded = runner(config.seed, ledger.recording(generate), ledger.record_env)
    rollouts = RolloutQueue(
        recorded.run_group,
        prepared.tasks.__getitem__,
        groups_per_step=rollout.groups_per_step,
        max_staleness=rollout.max_staleness,
        hold=rollout.hold,
        state=prepared.progress.pending,
        has_signal=lambda group: has_signal(
            group, group_advantages(group, config.algorithm, rollout)
        ),
        max_refills=rollout.max_refills,
    )
    stack.push_async_callback(rollouts.close)
    return Run(
        config=config,
        position=prepared.progress.position,
        examined=examined,
        console=console,
        folder=prepared.folder,
        engine=launched.engine,
        trainer=launched.trainer,
        interrupt=interrupt,
        rollouts=rollouts,
        ledger=ledger,
        evaluation=runner(config.seed + EVALUATION_SEED, generate),
        eval_sets=prepared.eval_sets,
        trainer_thread=launched.trainer_thread,
        advice=Advice(prepared.renderer.action, "tools" in examined.environment_report),
    )


def _open_folder(prepared: Prepared, examined: Examined, say: Callable[[str], None]) -> None:
    folder, step = prepared.folder, prepared.progress.position.step
    folder.reading = reading(prepared.renderer.tokenizer, prepared.config.records.max_text_chars)
    is_new = prepared.progress.checkpoint is None
    if is_new:
        folder.check_is_new()
    try:
        if is_new:
            folder.create(prepared.config, prepared.origin, say)
            write_fingerprints(folder.path, prepared.files)
        else:
            folder.reopen(step, prepared.config.trackers, say)
        folder.note_left_out(prepared.left_out)
        folder.note_environment(step, examined.environment_report)
    except OSError:
        if is_new:
            folder.discard()
        raise


class LeftOut:
    """Names tasks that turn out to be unplayable during the run, each once."""

    def __init__(self, prepared: Prepared, console: RunConsole) -> None:
        self._prepared, self._console = prepared, console
        self._sentences: dict[str, str] = {}

    def add(self, task_id: str, reason: str) -> None:
        """Print and record why a task is left out."""
        if task_id not in self._sentences:
            self._sentences[task_id] = reason
            self._console.print(f"left out: {reason}")
            self._prepared.folder.note_left_out(
                [*self._prepared.left_out, *self._sentences.values()]
            )
