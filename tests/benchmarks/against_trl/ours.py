"""Our side: the loop of `tir_alp.train`, with completions that end at a fixed length.

The run is opened as `train` opens it, without the doctor's checks: its queue, renderer, sandbox,
ledger, records and weight sync are part of a step.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import torch

from tests.benchmarks.against_trl.worker import Case, Channel, report, serve, wait_for_turn
from tir_alp.config import Config, CustomEngineConfig, TransformersConfig
from tir_alp.engines.base import Completion, EngineContext, Sampling
from tir_alp.engines.transformers import TransformersEngine, open_transformers
from tir_alp.roles import Node
from tir_alp.run.launch import Launched
from tir_alp.run.local_placement import LocalPlacement
from tir_alp.run.open_run import Examined, open_run
from tir_alp.run.prepare import Prepared
from tir_alp.train import learn, publish
from tir_alp.types import TrajectoryGroup

HERE = "tests.benchmarks.against_trl"
NUM_ROWS = 256  # of the data, one in eight of which is held out


class FixedLengths:
    """The embedded engine without ends: a completion has as many tokens as it may have."""

    def __init__(self, engine: TransformersEngine) -> None:
        self._engine = engine
        self.load_weights, self.lend_memory = engine.load_weights, engine.lend_memory
        self.abort, self.health, self.close = engine.abort, engine.health, engine.close

    async def generate(self, token_ids: tuple[int, ...], sampling: Sampling) -> Completion:
        """Continue a sequence; nothing but the limit ends it."""
        endless = replace(sampling, stop_token_ids=frozenset(), stop_matcher=None)
        return await self._engine.generate(token_ids, endless)


@asynccontextmanager
async def open_fixed(
    config: CustomEngineConfig, context: EngineContext
) -> AsyncIterator[FixedLengths]:
    """Open the engine; an `EngineFactory`."""
    async with open_transformers(TransformersConfig(**config.kwargs), context) as engine:
        yield FixedLengths(engine)


class NoChecks:
    """In place of the doctor's checks, which do not belong to a step."""

    def before_launch(
        self,
        prepared: Prepared,
        make_env: Callable[[], gymnasium.Env[str, str]],
        nodes: Sequence[Node],
    ) -> Examined:
        """As `StartChecks.before_launch`."""
        return Examined({"tools": {}})

    async def after_launch(
        self, prepared: Prepared, launched: Launched, prompts: Sequence[str]
    ) -> Sequence[str]:
        """As `StartChecks.after_launch`."""
        return ()


def config_of(case: Case) -> Config:
    """Return the config of a case; runs and data are written to the working folder."""
    data = Path("questions.jsonl")
    questions = [question_of(number, case.num_examples) for number in range(NUM_ROWS)]
    rows = [{"question": question, "answer": "0"} for question in questions]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    name = f"{case.model}-{case.num_completions}-{case.has_tool}-{case.precision}"
    kwargs = {"num_completions": case.num_completions, "has_tool": case.has_tool}
    values: Mapping[str, Any] = {
        "name": f"{name}-{time.time_ns()}",
        "steps": case.steps,
        "trackers": (),
        "model": {"path": case.folder},
        "env": {"id": f"{HERE}.environment:FixedTurns-v0", "kwargs": kwargs},
        "data": {"source": "jsonl", "path": data},
        "rollout": {
            "groups_per_step": case.num_groups,
            "group_size": case.group_size,
            "max_turn_tokens": case.num_tokens,
            "max_context_tokens": 4096,
            "void_turns": "keep",
        },
        "engine": {
            "type": "custom",
            "factory": f"{HERE}.ours:open_fixed",
            "kwargs": {"precision": case.precision},
            "dtype": case.precision,
            "reproducible": True,
        },
        "trainer": {
            "device": "cpu",
            "lr": 1e-6,
            "dtype": case.precision,
            "share_prompts": case.share_prompts,
        },
        "checkpoint": {"every": 0},
        "eval": {"num_tasks": 1},
    }
    return Config.model_validate(values)


def question_of(number: int, num_examples: int) -> str:
    """Return a question of about 270 characters, and 180 more for each worked example before it.

    All questions have different numbers; the examples are the same in each.
    """
    return (
        "Solve the problem step by step. You may write a Python program and read what it prints "
        "before you go on. Put the final answer into a box, and write nothing after it. "
        f"{''.join(map(example, range(num_examples)))}The "
        "problem: a shop sells pens in boxes. What do "
        f"{100 + number} boxes cost if each has 12 pens and each pen costs 37 cents?"
    )


def example(number: int) -> str:
    """Return a worked example of about 180 characters."""
    apples, price = 3 + number, 40 + 7 * number
    return (
        f"An example: what do {apples} apples cost if each costs {price} cents? A program is "
        f"print({apples} * {price}), it prints {apples * price}, and so the answer to this one is "
        f"\\boxed{{{apples * price}}} cents. "
    )


def facts(groups: Sequence[TrajectoryGroup], seconds: float, rollout_s: float) -> dict[str, Any]:
    """Return what is reported of a step."""
    played = [each for group in groups for each in group.trajectories]
    return report(
        seconds,
        rollout_s,
        [group.trajectories[0].prompt.token_ids for group in groups],
        [[len(turn.completion) for turn in each.turns] for each in played],
        [sum(len(turn.observation) for turn in each.turns) for each in played],
    )


async def steps(case: Case, channel: Channel) -> None:
    """Open a run and make its steps, each when it is this side's turn."""
    config = config_of(case)
    async with open_run(config, LocalPlacement(config), NoChecks()) as run:
        numbers = range(case.steps * case.num_groups)
        questions = [run.rollouts._task_at(number).question for number in numbers]
        channel.send({"opened": True, "questions": questions})
        with run.console.training(0, case.steps):
            for step in range(case.steps):
                wait_for_turn(channel)  # it blocks the event loop, so that nothing begins
                began = time.monotonic()
                groups = await run.rollouts.take()
                rolled_out = time.monotonic()
                metrics = await learn(run, groups, step)
                await publish(run, groups, step + 1, metrics, began)
                ended = time.monotonic()
                assert not metrics["train/skipped_updates"], "an update was skipped"
                channel.send(facts(groups, ended - began, rolled_out - began))


def perform(case: Case, channel: Channel) -> None:
    """Make the steps of a case."""
    torch.set_num_threads(case.threads)
    asyncio.run(steps(case, channel))


if __name__ == "__main__":
    serve(perform)
