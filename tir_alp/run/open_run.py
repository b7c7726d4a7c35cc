"""Puts the parts of a run together from its config, and takes them apart again.

Everything that a user can get wrong is found here, before the run's folder is made: model,
tokenizer, tasks, environment, prompt. Each is a ValueError that says what to do.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tir_alp import doctor
from tir_alp.algorithm.advantage import group_advantages, has_signal
from tir_alp.config import Config
from tir_alp.doctor.environment import check_environment
from tir_alp.engines.base import Engine
from tir_alp.models.tiny import SHIPPED
from tir_alp.records.folder import RunFolder
from tir_alp.records.ledger import Ledger
from tir_alp.records.trajectories import state_from_row
from tir_alp.roles import Placement, TrainerRole, ask_trainer_in
from tir_alp.rollouts.data import Task, left_out, load_held_out, load_order
from tir_alp.rollouts.environment import make_environment
from tir_alp.rollouts.episode import EpisodeRunner, Watch
from tir_alp.rollouts.lockstep import LogicalOrder
from tir_alp.rollouts.queue import QueueState, RolloutQueue
from tir_alp.rollouts.renderer import make_renderer
from tir_alp.run.console import RunConsole
from tir_alp.run.interrupt import Interrupt
from tir_alp.run.local_placement import LocalPlacement
from tir_alp.run.watchdog import Watchdog
from tir_alp.training import checkpoint
from tir_alp.training.checkpoint import Position
from tir_alp.training.policy import load_tokenizer
from tir_alp.training.structure import load_outline

_EVALUATION = 1 << 32  # evaluation draws from seeds of its own
_NUM_CHECKED = 256  # tasks whose prompts are measured before a run begins
_NUM_NAMED = 20  # rows that were left out


@dataclass(frozen=True, slots=True)
class Run:
    """A run, ready to go."""

    config: Config
    position: Position
    environment_report: dict[str, Any]
    """What the environment says that it runs in; see `check_environment`."""
    console: RunConsole
    folder: RunFolder
    engine: Engine
    trainer: TrainerRole
    interrupt: Interrupt
    rollouts: RolloutQueue
    ledger: Ledger
    evaluation: EpisodeRunner
    held_out: Sequence[Task]
    trainer_thread: ThreadPoolExecutor
    """Where the trainer computes, so that the event loop goes on meanwhile."""


@asynccontextmanager
async def open_run(
    config: Config,
    resume: Path | None = None,
    parts: Placement | None = None,
    interrupt: Interrupt | None = None,
    environment: dict[str, Any] | None = None,
) -> AsyncIterator[Run]:
    """Build a run, new or from the newest whole checkpoint of the folder `resume`.

    Args:
        config: Of the run.
        resume: Folder to go on with.
        parts: Makes its parts; None: in this process.
        interrupt: Shared with the run before it.
        environment: Of the same run when it was open before, in the same parts: it passed all
            checks then, and is not examined again.

    Raises:
        ValueError: For what a user can mend; nothing has been written then.
    """
    async with AsyncExitStack() as stack:
        console = RunConsole()
        initial = str(SHIPPED.get(config.model.path, config.model.path))
        parts = parts or LocalPlacement(config, console.print)
        path, position, found = initial, Position(0, 0), None
        pending, attempts = QueueState(), []
        if resume is not None:
            newest = asyncio.to_thread(checkpoint.newest, resume / "checkpoints")
            found, position, refused = await newest
            path = str(found)
            kept = checkpoint.load_rollouts(found)
            pending, attempts = state_from_row(kept["queue"]), kept["attempts"]
            console.print("".join(f"refused: {reason}\n" for reason in refused) + f"from {found}")
            if position.step >= config.steps:
                raise ValueError(
                    f"{resume} has made its {position.step} steps: give --steps more to go on"
                )

        tokenizer = load_tokenizer(path)
        with closing(make_environment(config)) as env:
            renderer = make_renderer(config, tokenizer, env)
        tasks = load_order(config.data, config.seed)
        held_out = load_held_out(config.data, config.eval.num_tasks)
        not_taken = left_out(config.data)
        if not_taken:
            console.print(describe_left_out(not_taken))
        soon = [tasks[position.group + offset] for offset in range(_NUM_CHECKED)]

        def look_at_environment() -> tuple[dict[str, Any], list[doctor.Finding], list[str]]:
            report = check_environment(config, renderer, [*soon, *held_out], parts.make_env)
            with closing(parts.make_env()) as env:
                found = doctor.examine_config(config, path, tokenizer, renderer, env, soon[0])
                texts = [env.reset(seed=each.seed, options=each.to_options()) for each in soon[:2]]
            return report, found, [text for text, _ in texts]

        is_examined, ignored, prompts = environment is not None, [], []
        if environment is None:
            # Not in the event loop: that is where a runner which is lost meanwhile gets replaced.
            environment, findings, prompts = await asyncio.to_thread(look_at_environment)
            ignored = doctor.demand(findings, config.doctor.ignore)

        rollout = config.rollout
        num_episodes = (rollout.max_staleness + 1) * rollout.groups_per_step * rollout.group_size
        env_threads = ThreadPoolExecutor(num_episodes, thread_name_prefix="env")
        stack.callback(env_threads.shutdown, wait=False, cancel_futures=True)
        slots = asyncio.Semaphore(num_episodes)
        folder = RunFolder(resume or Path("runs") / run_name(config))
        trainer = await parts.trainer(folder.path, initial, found)
        stack.callback(trainer.close)
        trainer_thread = ThreadPoolExecutor(1, thread_name_prefix="trainer")
        stack.callback(trainer_thread.shutdown)

        engine = await stack.enter_async_context(
            parts.engine(
                *(path, position.step, renderer),
                ask_trainer_in(trainer, trainer_thread),
            )
        )
        if not is_examined:
            findings = await doctor.examine_engine(
                *(config, engine, load_outline(path), trainer, trainer.weights),
                *(position.step, tokenizer, renderer, prompts),
            )
            ignored += doctor.demand(findings, config.doctor.ignore)
        for each in ignored:
            console.print(f"warning: {each}")
        ledger = Ledger(rollout.group_size, config.seed)
        ledger.restore(attempts)
        if found is not None:
            folder.reopen(position.step)
        else:
            folder.create(config)
        stack.enter_context(closing(folder))
        folder.note_left_out(not_taken)
        folder.note_environment(position.step, environment)

        watchdog = Watchdog(log=console.print)
        watching = asyncio.create_task(watchdog.watch(), name="watchdog")
        stack.callback(watching.cancel)
        generate = ledger.engine(engine.generate)
        order = LogicalOrder(generate) if config.deterministic else None

        def runner(seed: int, watch: Watch = lambda env, uid: env) -> EpisodeRunner:
            return EpisodeRunner(
                make_env=parts.make_env,
                generate=generate if order is None else order.generate,
                renderer=renderer,
                limits=rollout,
                threads=env_threads,
                slots=slots,
                seed=seed,
                on_failure=lambda failure: console.print(f"episode failed: {failure}"),
                watchdog=watchdog,
                admission=contextlib.nullcontext if order is None else order.episode,
                watch=watch,
            )

        rollouts = RolloutQueue(
            runner(config.seed, ledger.watch).run_group,
            tasks.__getitem__,
            groups_per_step=rollout.groups_per_step,
            max_staleness=rollout.max_staleness,
            hold=rollout.hold,
            state=pending,
            has_signal=lambda group: has_signal(
                group, group_advantages(group, config.algorithm, rollout)
            ),
            max_refills=rollout.max_refills,
        )
        stack.push_async_callback(rollouts.close)
        yield Run(
            config=config,
            position=position,
            environment_report=environment,
            console=console,
            folder=folder,
            engine=engine,
            trainer=trainer,
            interrupt=interrupt or Interrupt(),
            rollouts=rollouts,
            ledger=ledger,
            evaluation=runner(config.seed + _EVALUATION),
            held_out=held_out,
            trainer_thread=trainer_thread,
        )


def describe_left_out(sentences: Sequence[str]) -> str:
    """Say which rows of the data were left out, or at least how many."""
    some = "".join(f"  {sentence}\n" for sentence in sentences[:_NUM_NAMED])
    more = len(sentences) - _NUM_NAMED
    return f"left out of the data:\n{some}" + (
        f"  and {more} more, in left_out.txt\n" if more > 0 else ""
    )


def run_name(config: Config) -> str:
    """The run's folder below `runs/`."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    method = config.algorithm.name.replace(":", "-")  # of `module:NAME`
    return config.name or f"{method}-seed{config.seed}-{stamp}"
