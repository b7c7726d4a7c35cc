"""Plays episodes of agents: a session of the gateway for each, and the environment's verdict.

Everything about groups, retries, deadlines and failures is that of `EpisodeRunner`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import gymnasium

from tir_alp.agents.dialogue_encoder import DialogueEncoder
from tir_alp.agents.gateway import Gateway
from tir_alp.agents.session import Session, SessionSettings
from tir_alp.agents.trajectories import Verdict, to_trajectory
from tir_alp.config import AgentsConfig, Config
from tir_alp.engines.base import Completion, Sampling
from tir_alp.rollouts.data import Task
from tir_alp.rollouts.episode import (
    EpisodeFailed,
    EpisodeRunner,
    checked_step,
)
from tir_alp.rollouts.renderer import Renderer
from tir_alp.rollouts.traces import mask_overlong
from tir_alp.tools.outcome import Outcome
from tir_alp.tools.python_tool import PythonTool
from tir_alp.types import Trajectory, split_uid

_GRACE_S = 30.0  # that an environment gets beyond the deadline of its agent


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentRunner(EpisodeRunner):
    """Plays episodes of an environment with `play`, such as `Agent-v0`."""

    gateway: Gateway
    agents: AgentsConfig

    async def _run(
        self, task: Task, group_id: int, sequence_uid: int, temperature: float | None
    ) -> Trajectory:
        episode = f"task {task.task_id}, sequence {sequence_uid}"
        env = await self._in_thread(self.make_env, f"{episode}: making the environment")
        env = self.record_env(env, sequence_uid)
        clock = _Clock()
        try:
            await self._in_thread(
                lambda: env.reset(seed=task.seed, options=task.to_options()),
                f"{episode}: env.reset",
            )
            session = self._session(sequence_uid, temperature, clock)
            report = await self._play(env, session, episode)
            if session.failures:
                raise EpisodeFailed(Outcome.INFRA_ERROR, f"{episode}: {session.failures[0]}")
            if not session.capture.num_exchanges:
                raise EpisodeFailed(
                    Outcome.INFRA_ERROR,
                    f"{episode}: the agent ended without a completion of the model: {report:.500}",
                )
            text, reward, terminated, truncated, info = await self._in_thread(
                lambda: checked_step(env.step(report)), f"{episode}: env.step"
            )
            outcome = Outcome(info.get("outcome", Outcome.OK))
            if outcome.is_infrastructure:
                raise EpisodeFailed(outcome, f"{episode}: {info.get('error') or outcome}")
        finally:
            env.get_wrapper_attr("stop")()
            self.threads.submit(env.close)
        trajectory = to_trajectory(
            session.capture,
            Verdict(report, text, reward, terminated, truncated, info),
            task_id=task.task_id,
            group_id=group_id,
            sequence_uid=sequence_uid,
            train_on=self.agents.train_on,
            timing=clock.timing,
        )
        return mask_episode(trajectory, self.limits.overlong)

    def _session(self, uid: int, temperature: float | None, clock: _Clock) -> Session:
        limits = self.limits
        settings = SessionSettings(
            uid=uid,
            seed=self.seed,
            temperature=limits.temperature if temperature is None else temperature,
            max_context_tokens=limits.max_context_tokens,
            max_turn_tokens=limits.max_turn_tokens,
            timeout_s=limits.generate_timeout_s,
        )

        async def generate(token_ids: tuple[int, ...], sampling: Sampling) -> Completion:
            trace = split_uid(sampling.sequence_uid)[1]
            began = time.monotonic()
            with self.waiting(f"sequence {uid}, trace {trace}: the engine"):
                completion = await self.generate(token_ids, sampling)
            clock.add(began)
            return completion

        return Session(generate, self.gateway.encoder, settings)

    async def _play(self, env: gymnasium.Env[str, str], session: Session, episode: str) -> str:
        """Run the agent against its session; return its report."""
        await self.gateway.start()
        endpoint = self.gateway.open(session)
        play, limit = env.get_wrapper_attr("play"), env.get_wrapper_attr("timeout_s")
        try:
            async with asyncio.timeout(limit + _GRACE_S):
                loop = asyncio.get_running_loop()
                return await loop.run_in_executor(self.threads, play, endpoint.environment())
        except TimeoutError:
            message = f"{episode}: the agent could not be ended {_GRACE_S:g} s after its deadline"
            raise EpisodeFailed(Outcome.INFRA_ERROR, message) from None
        except Exception as error:
            message = f"{episode}: running the agent raised {error!r}"
            raise EpisodeFailed(Outcome.INFRA_ERROR, message) from error
        finally:
            await self.gateway.end(endpoint)


def agent_runner(
    stack: AsyncExitStack, config: Config, renderer: Renderer
) -> Callable[..., EpisodeRunner]:
    """Return what makes the runners of a run's agents; they share a gateway, which `stack` closes.

    Args:
        stack: Closes the gateway.
        config: Config of the run.
        renderer: Renderer of the run.
    """
    gateway = Gateway(encoder_of(config.agents, renderer), python=python_of(config.agents))
    stack.push_async_callback(gateway.close)
    return partial(AgentRunner, gateway=gateway, agents=config.agents)


def python_of(agents: AgentsConfig) -> PythonTool:
    """Return the sandboxed Python that the agents of a run are offered.

    Raises:
        ValueError: Its settings are wrong.
    """
    try:
        return PythonTool(**agents.python)
    except (TypeError, ValueError) as error:
        raise ValueError(f"agents.python: {error}") from error


def encoder_of(agents: AgentsConfig, renderer: Renderer) -> DialogueEncoder:
    """Return the encoder of a run, for its renderer's tokenizer."""
    return DialogueEncoder(
        renderer.tokenizer,
        calls=agents.calls,
        end_token_ids=renderer.stop_token_ids,
        clock=renderer.clock,
    )


@dataclass(slots=True)
class _Clock:
    """When the completions of an episode were sampled, by their number."""

    timing: dict[int, Mapping[str, float]] = field(default_factory=dict)

    def add(self, began: float) -> None:
        took = {"begin": began, "generate": time.monotonic() - began}
        self.timing[len(self.timing)] = took


def mask_episode(trajectory: Trajectory, overlong: str) -> Trajectory:
    """Take completions that a limit cut out of the loss; see `mask_overlong`."""

    def masked(each: Trajectory, **more: Any) -> Trajectory:
        return replace(each, turns=mask_overlong(each.turns, overlong, each.truncated), **more)

    return masked(trajectory, branches=tuple(map(masked, trajectory.branches)))
