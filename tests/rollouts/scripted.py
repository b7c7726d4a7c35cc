"""A scripted policy, a scripted environment, and functions that play episodes with them."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import gymnasium
import pytest

from tir_alp.config import RolloutConfig
from tir_alp.engines.base import Completion, Sampling
from tir_alp.models.tiny.model import make_tokenizer
from tir_alp.rollouts.data import Task
from tir_alp.rollouts.episode import EpisodeFailed, EpisodeRunner
from tir_alp.rollouts.renderer import Renderer
from tir_alp.types import StopReason, Trajectory

END, USER, ASSISTANT, TOOL = 1, 2, 3, 4
A, B = 70, 71  # the tokens of "a" and "b"
PROMPT = (USER, A, B, END, ASSISTANT)
TASK = Task("t7", "ab", "42")
CALL = tuple(make_tokenizer().encode("```py\n1\n```", add_special_tokens=False))

GO_ON: tuple = ("b", 0.0, False, False, {})
ANSWERED: tuple = ("", 1.0, True, False, {"correct": True})


def broken(outcome: str, error: str = "") -> tuple:
    return ("", 0.0, False, True, {"outcome": outcome, "error": error})


def completion(*ids: int, reason=StopReason.EOS, version: int = 0) -> Completion:
    logprobs = tuple(-id / 100 for id in ids)
    return Completion(token_ids=ids, logprobs=logprobs, stop_reason=reason, policy_version=version)


class Scripted(gymnasium.Env[str, str]):
    """Returns the next line of its script from each step, or calls it if it is a function."""

    def __init__(self, *script: Any, prompt: str = "ab"):
        self.script, self.prompt = list(script), prompt
        self.tasks: list[Any] = []
        self.actions: list[str] = []
        self.num_closed = 0

    def reset(self, *, seed=None, options=None):
        self.tasks.append(options)
        return self.prompt, {}

    def step(self, action):
        self.actions.append(action)
        line = self.script.pop(0)
        return line() if callable(line) else line

    def close(self):
        self.num_closed += 1


class Policy:
    """Returns its lines as completions, and records the contexts that it was given."""

    def __init__(self, *lines: Completion):
        self.lines = list(lines)
        self.read: list[tuple[int, ...]] = []
        self.samplings: list[Sampling] = []

    async def __call__(self, token_ids: tuple[int, ...], sampling: Sampling) -> Completion:
        self.read.append(token_ids)
        self.samplings.append(sampling)
        return self.lines.pop(0) if self.lines else completion(END)


def play(
    work: Callable[[EpisodeRunner], Any],
    generate: Any,
    *envs: Scripted,
    slots: int = 8,
    max_observation_tokens: int = 64,
    **limits: Any,
) -> tuple[Any, list[EpisodeFailed]]:
    """Do some work with a runner that makes `envs` in order; return the failures as well."""
    failures: list[EpisodeFailed] = []
    waiting = list(envs)

    async def main() -> Any:
        runner = EpisodeRunner(
            make_env=lambda: waiting.pop(0),
            generate=generate,
            renderer=Renderer(make_tokenizer(), max_observation_tokens=max_observation_tokens),
            limits=RolloutConfig.model_validate(
                {"max_turn_tokens": 20, "max_context_tokens": 200} | limits
            ),
            threads=threads,
            slots=asyncio.Semaphore(slots),
            seed=11,
            on_failure=failures.append,
        )
        return await work(runner)

    with ThreadPoolExecutor(8) as threads:
        return asyncio.run(main()), failures


def episode(generate: Any, env: Scripted, **settings: Any) -> Trajectory:
    return play(lambda runner: runner.run_episode(TASK, 5, 40), generate, env, **settings)[0]


def group_of(group_id: int) -> Callable[[EpisodeRunner], Any]:
    return lambda runner: runner.run_group(TASK, group_id)


def failure(generate: Any, env: Scripted, **settings: Any) -> EpisodeFailed:
    with pytest.raises(EpisodeFailed) as caught:
        episode(generate, env, **settings)
    return caught.value
