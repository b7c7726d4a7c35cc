"""One coroutine per episode: the policy writes, the environment answers, until the episode ends.

Tokens are only ever appended to a trace; where the history is rewritten, another trace begins. The
environment is a blocking `gymnasium.Env` and runs in threads.
There is no barrier between turns: an episode waits only for its own next completion or step. Every
wait has a deadline, and a failure names task, sequence, turn and call.
"""

from __future__ import annotations

import asyncio
import contextvars
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import gymnasium

from tir_alp.config import RolloutConfig
from tir_alp.engines.base import Completion, Generate, Sampling
from tir_alp.rollouts.data import Task
from tir_alp.rollouts.history import Conversation, Following
from tir_alp.rollouts.renderer import PromptTooLong, Renderer
from tir_alp.rollouts.traces import GrowingTrace, following, is_full, joined, mask_traces
from tir_alp.tools.outcome import Outcome
from tir_alp.types import StopReason, TokenSpan, Trajectory, TrajectoryGroup, Turn, trace_uid

T = TypeVar("T")

RecordEnv = Callable[[gymnasium.Env[str, str], int], gymnasium.Env[str, str]]
"""Wraps the environment in which the sequence of the given uid will be played."""

MAX_ATTEMPTS = 2
"""An episode that failed because of infrastructure is played once more, in a fresh environment."""


class EpisodeFailed(Exception):
    """Infrastructure failed during an episode: there is nothing to score.

    Args:
        outcome: Kind of failure.
        message: Names task, sequence, turn and call, and describes the failure.
    """

    def __init__(self, outcome: Outcome, message: str) -> None:
        super().__init__(message)
        self.outcome = outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeRunner:
    """Plays episodes; its fields are what all episodes of a run share."""

    make_env: Callable[[], gymnasium.Env[str, str]]
    generate: Generate
    renderer: Renderer
    limits: RolloutConfig
    threads: Executor
    """Run the blocking calls of environments."""
    slots: asyncio.Semaphore
    """Limits concurrent episodes to the number of threads. An environment may wait for something
    that another one holds, e.g. a sandbox session, so none may have to wait for a thread too."""
    seed: int
    """Root seed of sampling."""
    on_failure: Callable[[EpisodeFailed], None]
    """Called after every failed attempt."""
    on_left_out: Callable[[str, str], None] = lambda task_id, reason: None
    """Called with a task's id and the reason why it cannot be played, once per episode."""
    admission: Callable[[], AbstractContextManager[None]] = nullcontext
    """Context that each episode holds from beginning to end."""
    record_env: RecordEnv = lambda env, uid: env
    """Wraps the environment of each attempt at an episode, e.g. to record its answers."""
    waiting: Callable[[str], AbstractContextManager[Any]] = nullcontext
    """Context that an episode holds while it waits; the argument describes what it waits for."""

    async def run_group(self, task: Task, group_id: int) -> TrajectoryGroup:
        """Sample a group of episodes of one task.

        An episode that fails twice is dropped and counted. A lone survivor is dropped as well:
        there is nothing to compare its reward with.
        """
        first = group_id * self.limits.group_size
        attempts = [
            self._run_stubborn(task, group_id, first + index)
            for index in range(self.limits.group_size)
        ]
        trajectories = [each for each in await asyncio.gather(*attempts) if each is not None]
        if len(trajectories) < min(2, self.limits.group_size):
            trajectories = []
        return TrajectoryGroup(
            task_id=task.task_id,
            group_id=group_id,
            trajectories=tuple(trajectories),
            num_failed=self.limits.group_size - len(trajectories),
        )

    async def _run_stubborn(self, task: Task, group_id: int, uid: int) -> Trajectory | None:
        for _ in range(MAX_ATTEMPTS):
            try:
                return await self.run_episode(task, group_id, uid)
            except EpisodeFailed as failure:
                self.on_failure(failure)
            except PromptTooLong as error:  # a fault of the data, which another attempt keeps
                self.on_left_out(task.task_id, str(error))
                return None
        return None

    async def run_episode(
        self, task: Task, group_id: int, sequence_uid: int, temperature: float | None = None
    ) -> Trajectory:
        """Play one episode to its end.

        Args:
            task: The task to reset the environment to.
            group_id: Id of the group, recorded in the trajectory.
            sequence_uid: Uid of the sequence, recorded in the trajectory; sampling depends on it.
            temperature: Sampling temperature in place of the configured one, e.g. 0 for greedy.

        Raises:
            EpisodeFailed: Engine, environment, tool or grader failed or missed a deadline.
            PromptTooLong: The prompt leaves no room in the context.
        """
        async with self.slots:
            with self.admission():
                return await self._run(task, group_id, sequence_uid, temperature)

    async def _run(
        self, task: Task, group_id: int, sequence_uid: int, temperature: float | None
    ) -> Trajectory:
        episode = f"task {task.task_id}, sequence {sequence_uid}"
        began = time.monotonic()
        env = await self._in_thread(self.make_env, f"{episode}: making the environment")
        env = self.record_env(env, sequence_uid)
        try:
            text = await self._in_thread(
                lambda: _text(env.reset(seed=task.seed, options=task.to_options())[0]),
                f"{episode}: env.reset",
            )
            prompt = self.renderer.prompt_within(text, self.limits.max_context_tokens, task.task_id)
            sampling = Sampling(
                max_tokens=self.limits.max_turn_tokens,
                temperature=self.limits.temperature if temperature is None else temperature,
                stop_token_ids=self.renderer.stop_token_ids,
                stop_matcher=self.renderer.stop_matcher,
                seed=self.seed,
                sequence_uid=sequence_uid,
            )
            prepare_s = time.monotonic() - began
            traces = [GrowingTrace(prompt)]
            terminated, truncated = await self._play(
                env, Conversation.about(text), traces, sampling, episode
            )
        finally:
            self.threads.submit(env.close)
        first = traces[0].turns[0]
        traces[0].turns[0] = replace(first, timing={**first.timing, "prepare": prepare_s})
        mask_traces(traces, self.limits, truncated)
        return joined(
            traces,
            task_id=task.task_id,
            group_id=group_id,
            sequence_uid=sequence_uid,
            terminated=terminated,
            truncated=truncated,
        )

    async def _play(
        self,
        env: gymnasium.Env[str, str],
        conversation: Conversation,
        traces: list[GrowingTrace],
        sampling: Sampling,
        episode: str,
    ) -> tuple[bool, bool]:
        """Play an episode after its reset; add its turns, and return (terminated, truncated)."""
        num_turns = 0
        while True:
            where, trace = f"{episode}, turn {num_turns}", traces[-1]
            context = trace.token_ids
            room = self.limits.max_context_tokens - len(context)
            began = time.monotonic()
            completion = await self._complete(
                context,
                replace(
                    sampling,
                    max_tokens=min(sampling.max_tokens, room),
                    sequence_uid=trace_uid(sampling.sequence_uid, len(traces) - 1),
                ),
                where,
            )
            generated = time.monotonic()
            action = self.renderer.action(completion.token_ids)
            text, reward, terminated, truncated, info = await self._in_thread(
                lambda action=action: checked_step(env.step(action)), f"{where}: env.step"
            )
            stepped = time.monotonic()
            outcome = Outcome(info.get("outcome", Outcome.OK))
            if outcome.is_infrastructure:
                raise EpisodeFailed(outcome, f"{where}: {info.get('error') or outcome}")
            num_tokens = len(context) + len(completion.token_ids)
            shown = Following(TokenSpan(()), begins=False)
            if not terminated and not truncated:
                conversation, shown = self._following(conversation, completion, text, info, where)
            if not terminated and is_full(shown, num_tokens, len(traces), self.limits):
                shown, truncated = Following(TokenSpan(()), begins=False), True
            trace.turns.append(
                Turn(
                    completion=TokenSpan(completion.token_ids, completion.logprobs),
                    observation=TokenSpan(()) if shown.begins else shown.span,
                    policy_version=completion.policy_version,
                    stop_reason=completion.stop_reason,
                    outcome=outcome,
                    reward=reward,
                    info={**info, "observation": text},
                    timing={
                        "begin": began,
                        "generate": generated - began,
                        "queue": completion.queue_s,
                        "tool": stepped - generated,
                    },
                    version_spans=completion.version_spans,
                    routing=trace.new_routing(completion),
                )
            )
            num_turns += 1
            if terminated or truncated:
                return terminated, truncated
            if shown.begins:
                traces.append(GrowingTrace(shown.span))

    def _following(
        self,
        conversation: Conversation,
        completion: Completion,
        text: str,
        info: Mapping[str, Any],
        where: str,
    ) -> tuple[Conversation, Following]:
        ids, stop = completion.token_ids, completion.stop_reason
        try:
            return following(self.renderer, conversation, ids, stop, text, info)
        except ValueError as error:
            raise EpisodeFailed(Outcome.INFRA_ERROR, f"{where}: {error}") from error

    async def _complete(
        self, token_ids: tuple[int, ...], sampling: Sampling, where: str
    ) -> Completion:
        try:
            async with asyncio.timeout(self.limits.generate_timeout_s):
                with self.waiting(f"{where}: the engine"):
                    completion = await self.generate(token_ids, sampling)
        except TimeoutError:
            limit = self.limits.generate_timeout_s
            message = f"{where}: the engine gave no completion within {limit:g} s"
            raise EpisodeFailed(Outcome.INFRA_ERROR, message) from None
        except RuntimeError as error:  # in the forward, e.g. out of memory; the engine goes on
            message = f"{where}: the engine failed: {error}"
            raise EpisodeFailed(Outcome.INFRA_ERROR, message) from error
        if completion.stop_reason is StopReason.ABORT:
            raise EpisodeFailed(Outcome.CANCELLED, f"{where}: the completion was aborted")
        return self.renderer.cut(completion)

    async def _in_thread(self, call: Callable[[], T], where: str) -> T:
        """Run a blocking call of the environment; abandon the thread if it misses its deadline.

        An exception fails the episode and not the run: one broken task must not cost the others.
        """
        try:
            async with asyncio.timeout(self.limits.env_timeout_s):
                try:
                    with self.waiting(where):
                        context = contextvars.copy_context()
                        loop = asyncio.get_running_loop()
                        return await loop.run_in_executor(self.threads, context.run, call)
                except Exception as error:
                    message = f"{where} raised {error!r}"
                    raise EpisodeFailed(Outcome.INFRA_ERROR, message) from error
        except TimeoutError:
            message = f"{where} did not answer within {self.limits.env_timeout_s:g} s"
            raise EpisodeFailed(Outcome.INFRA_ERROR, message) from None


def checked_step(step: tuple[Any, ...]) -> tuple[str, float, bool, bool, Mapping[str, Any]]:
    """Check what a step of an environment returned, which may be anything.

    Raises:
        ValueError: The observation is no text, the reward no finite number, or the outcome unknown.
    """
    text, reward, terminated, truncated, info = step
    if isinstance(reward, str) or not math.isfinite(float(reward)):
        raise ValueError(f"the reward is {reward!r:.60}, which is no finite number")
    Outcome(info.get("outcome", Outcome.OK))
    return _text(text), float(reward), bool(terminated), bool(truncated), info


def _text(observation: Any) -> str:
    if not isinstance(observation, str):
        raise ValueError(f"the observation is {observation!r:.60}, which is no text")
    return observation
