"""Episodes whose history is rewritten: an environment, a policy, and what is recorded of them."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import gymnasium

from tests.rollouts.call_templates import DROPS_THOUGHTS
from tir_alp.config import RolloutConfig
from tir_alp.engines.base import Completion, Sampling
from tir_alp.envs.spaces import TextSpace
from tir_alp.models.tiny.model import make_tokenizer
from tir_alp.records.ledger import Ledger
from tir_alp.records.ledger_rows import Attempt
from tir_alp.rollouts.data import Task
from tir_alp.rollouts.episode import EpisodeRunner
from tir_alp.rollouts.renderer import Renderer
from tir_alp.types import StopReason, Trajectory, TrajectoryGroup

TASK = Task("t7", "6*7?", "42")
SUMMARY = [
    {"role": "user", "content": "6*7? So far: 41 is wrong."},
    {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nI see."},
    {"role": "user", "content": "Go on."},
]
ANSWERS: list[tuple[str, float, dict[str, Any]]] = [
    ("Why?", 0.25, {"role": "user"}),
    ("41", 0.0, {"tool_calls": 1}),
    ("Sure <|end|>?", 0.0, {"role": "user"}),
    ("not shown", 0.0, {"messages": SUMMARY}),
    ("", 1.0, {"correct": True}),
]
"""Observation, reward and info of five turns: the traces begin after the first, third and fourth.
"""
WORDS = [f"<think>\nSo {number}.\n</think>\n\nIt is {number}" for number in range(5)]
WORDS[1] += "\n```py\n1\n```"


class Talk(gymnasium.Env[str, str]):
    """Answers each turn by the next line of a script."""

    action_space = observation_space = TextSpace()

    def __init__(self, answers=ANSWERS):
        self.answers, self.number = answers, 0

    def reset(self, *, seed=None, options=None):
        self.number = 0
        return (options or {}).get("task", {}).get("question", "6*7?"), {}

    def step(self, action):
        text, reward, info = self.answers[self.number]
        self.number += 1
        return text, reward, self.number == len(self.answers), False, dict(info)


def tokenizer(template: str = DROPS_THOUGHTS) -> Any:
    made = make_tokenizer()
    made.chat_template = template
    return made


def renderer(template: str = DROPS_THOUGHTS, **settings: Any) -> Renderer:
    given: dict[str, Any] = {"rewritten_history": "fork"} | settings
    return Renderer(tokenizer(template), **given)


class Speaker:
    """A policy that says the next of its words; it records what it was given."""

    def __init__(self, *words: str):
        self.words = [*words]
        self.read: list[tuple[int, ...]] = []
        self.samplings: list[Sampling] = []
        self._tokenizer = make_tokenizer()

    async def __call__(self, token_ids: tuple[int, ...], sampling: Sampling) -> Completion:
        text = self.words[len(self.read)]
        self.read.append(token_ids)
        self.samplings.append(sampling)
        ids = self._tokenizer.encode(f"{text}<|end|>", add_special_tokens=False)
        cut = len(ids) > sampling.max_tokens
        ids = ids[: sampling.max_tokens]
        number = len(self.read)
        return Completion(
            token_ids=tuple(ids),
            logprobs=tuple(-(0.001 * number + 0.0001 * place) for place in range(len(ids))),
            stop_reason=StopReason.LENGTH if cut else StopReason.EOS,
            policy_version=number,
        )


def play(
    speaker: Speaker, env: Any = None, made: Renderer | None = None, **limits: Any
) -> tuple[Trajectory, Attempt]:
    """Play an episode; return the trajectory, and the ledger's record of it."""
    ledger = Ledger(1)
    settings = {"max_turn_tokens": 200, "max_context_tokens": 2000, "group_size": 1} | limits
    failures: list[Any] = []

    async def main() -> Trajectory:
        runner = EpisodeRunner(
            make_env=lambda: Talk() if env is None else env,
            generate=ledger.recording(speaker),
            renderer=renderer() if made is None else made,
            limits=RolloutConfig.model_validate(settings),
            threads=threads,
            slots=asyncio.Semaphore(2),
            seed=3,
            on_failure=failures.append,
            record_env=ledger.record_env,
        )
        return await runner.run_episode(TASK, 5, 5)

    with ThreadPoolExecutor(4) as threads:
        trajectory = asyncio.run(main())
    rows = ledger.take([TrajectoryGroup("t7", 5, (trajectory,))], (), ())
    (attempt,) = [each for each in rows if each["kind"] == "attempt"]
    return trajectory, Attempt.from_record(json.loads(json.dumps(attempt)))
