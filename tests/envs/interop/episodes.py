"""Episodes of an environment with the embedded engine and the tiny model, and their audit."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import gymnasium
import torch

from tir_alp.config import RolloutConfig
from tir_alp.data import Task
from tir_alp.engines.base import Completion, Sampling
from tir_alp.engines.transformers import TransformersEngine
from tir_alp.policy import load_policy, load_tokenizer
from tir_alp.renderer import Renderer
from tir_alp.rollout import EpisodeFailed, EpisodeRunner
from tir_alp.tiny import BASE
from tir_alp.types import TokenSpan, Trajectory

torch.set_num_threads(1)

LIMITS = RolloutConfig(
    group_size=2,
    max_turn_tokens=24,
    max_context_tokens=2048,
    max_observation_tokens=400,
    env_timeout_s=600,
)


def play(
    env_id: str,
    kwargs: Mapping[str, Any],
    tasks: Sequence[Task],
    max_context_tokens: int = LIMITS.max_context_tokens,
) -> list[Trajectory]:
    """Play a group of each task at the same time; every token is accounted for.

    An environment that never ends by itself needs a small context: every turn reads all of it.

    Raises:
        AssertionError: An episode failed, or holds another token than was sampled or shown.
    """
    requests: dict[int, list[tuple[tuple[int, ...], Completion]]] = {}
    failures: list[EpisodeFailed] = []
    renderer = Renderer(
        load_tokenizer(str(BASE)), max_observation_tokens=LIMITS.max_observation_tokens
    )

    async def main() -> list[Trajectory]:
        engine = TransformersEngine(load_policy(str(BASE)), max_cache_tokens=1 << 16)

        async def generate(token_ids: tuple[int, ...], sampling: Sampling) -> Completion:
            completion = await engine.generate(token_ids, sampling)
            requests.setdefault(sampling.sequence_uid, []).append((token_ids, completion))
            return completion

        with ThreadPoolExecutor(8) as threads:
            runner = EpisodeRunner(
                make_env=lambda: gymnasium.make(env_id, disable_env_checker=True, **kwargs),
                generate=generate,
                renderer=renderer,
                limits=LIMITS.model_copy(update={"max_context_tokens": max_context_tokens}),
                threads=threads,
                slots=asyncio.Semaphore(8),
                seed=0,
                on_failure=failures.append,
            )
            try:
                groups = await asyncio.gather(
                    *(runner.run_group(task, number) for number, task in enumerate(tasks))
                )
            finally:
                await engine.close()
        return [trajectory for group in groups for trajectory in group.trajectories]

    trajectories = asyncio.run(main())
    assert not failures, failures
    assert len(trajectories) == len(tasks) * LIMITS.group_size
    for trajectory in trajectories:
        _check_tokens(trajectory, requests[trajectory.sequence_uid], renderer)
    return trajectories


def _check_tokens(
    trajectory: Trajectory,
    requests: list[tuple[tuple[int, ...], Completion]],
    renderer: Renderer,
) -> None:
    """What was given to the engine and what came back is the trajectory, and nothing else is."""
    token_ids = trajectory.prompt.token_ids
    for turn, (given, sampled) in zip(trajectory.turns, requests, strict=True):
        assert given == token_ids
        cut = renderer.cut(sampled)
        assert turn.completion == TokenSpan(cut.token_ids, cut.logprobs, turn.completion.trainable)
        shown = TokenSpan(())
        if turn is not trajectory.turns[-1]:
            shown = renderer.observation(turn.info["observation"], cut.stop_reason)
        assert turn.observation == shown
        token_ids += turn.completion.token_ids + turn.observation.token_ids
    assert trajectory.token_ids == token_ids
    sampled_tokens = sum(len(turn.completion) for turn in trajectory.turns)
    assert sum(trajectory.loss_mask) == sampled_tokens > 0
