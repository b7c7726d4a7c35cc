"""What all episodes that a process plays share: threads, slots, the watchdog and the lockstep."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from typing import Protocol

import gymnasium

from tir_alp.config import Config
from tir_alp.engines.base import Generate
from tir_alp.rollouts.environment import has_agents
from tir_alp.rollouts.episode import EpisodeRunner, RecordEnv
from tir_alp.rollouts.lockstep import Lockstep
from tir_alp.rollouts.renderer import Renderer
from tir_alp.run.watchdog import Watchdog


class MakeRunner(Protocol):
    """Makes a runner; all that it makes play in the same threads and slots."""

    def __call__(
        self, seed: int, generate: Generate, record_env: RecordEnv = lambda env, uid: env
    ) -> EpisodeRunner:
        """Make a runner.

        Args:
            seed: Root seed of sampling.
            generate: Samples completions.
            record_env: Wraps the environment of each attempt at an episode.
        """
        ...


def open_episodes(
    stack: AsyncExitStack,
    config: Config,
    num_episodes: int,
    make_env: Callable[[], gymnasium.Env[str, str]],
    renderer: Renderer,
    log: Callable[[str], None],
    on_left_out: Callable[[str, str], None] = lambda task_id, reason: None,
) -> MakeRunner:
    """Start what episodes need; `stack` ends it.

    Args:
        stack: Ends the threads and the watchdog.
        config: Config of the run.
        num_episodes: Episodes that are played at the same time.
        make_env: Makes an environment; called in the threads.
        renderer: Renderer of the run.
        log: Called with a line for people.
        on_left_out: See `EpisodeRunner`.
    """
    watchdog = Watchdog(log=log)
    watching = asyncio.create_task(watchdog.watch(), name="watchdog")
    stack.callback(watching.cancel)
    threads = ThreadPoolExecutor(num_episodes, thread_name_prefix="env")
    stack.callback(threads.shutdown, wait=False, cancel_futures=True)
    slots = asyncio.Semaphore(num_episodes)
    lockstep = Lockstep() if config.deterministic else None
    kind: Callable[..., EpisodeRunner] = EpisodeRunner
    if has_agents(config):
        # Imported here because it needs the extra 'agents', which other runs do without.
        from tir_alp.agents.runner import agent_runner

        kind = agent_runner(stack, config, renderer)

    def runner(
        seed: int, generate: Generate, record_env: RecordEnv = lambda env, uid: env
    ) -> EpisodeRunner:
        return kind(
            make_env=make_env,
            generate=generate if lockstep is None else lockstep.in_step(generate),
            renderer=renderer,
            limits=config.rollout,
            threads=threads,
            slots=slots,
            seed=seed,
            on_failure=lambda failure: log(f"episode failed: {failure}"),
            on_left_out=on_left_out,
            waiting=watchdog.waiting,
            admission=contextlib.nullcontext if lockstep is None else lockstep.episode,
            record_env=record_env,
        )

    return runner
