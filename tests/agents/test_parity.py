"""An agent at the gateway samples what the same task samples as an environment."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack

import pytest

pytest.importorskip("openai")

from tir_alp.agents.runner import agent_runner
from tir_alp.config import AgentsConfig, Config, RolloutConfig
from tir_alp.engines.transformers import TransformersEngine
from tir_alp.envs.agent_env import AgentEnv
from tir_alp.envs.multi_tool_env import MultiToolEnv
from tir_alp.envs.tasks import ArithmeticTasks
from tir_alp.models.tiny import ABLE
from tir_alp.rollouts.data import Task
from tir_alp.rollouts.episode import EpisodeRunner
from tir_alp.rollouts.renderer import Renderer
from tir_alp.training.policy import load_policy, load_tokenizer

LIMITS = RolloutConfig(max_turn_tokens=64, max_context_tokens=256)


@pytest.mark.sandbox
def test_the_tokens_are_those_of_the_same_task_as_an_environment():
    tokenizer = load_tokenizer(str(ABLE))
    source = ArithmeticTasks(seed=3, size=24)
    tasks = [Task(each["task_id"], each["question"], each["answer"]) for each in source]

    async def main():
        async with AsyncExitStack() as stack:
            engine = TransformersEngine(load_policy(str(ABLE)), max_cache_tokens=8192)
            stack.push_async_callback(engine.close)
            renderer = Renderer(tokenizer)
            config = Config(agents=AgentsConfig(calls="fenced"))
            common = {
                "generate": engine.generate,
                "renderer": renderer,
                "limits": LIMITS,
                "threads": threads,
                "slots": asyncio.Semaphore(4),
                "seed": 7,
                "on_failure": lambda failure: None,
            }
            made = EpisodeRunner(
                make_env=lambda: MultiToolEnv(
                    tools=["python"], instruction="", max_turns=3, call_format="fenced"
                ),
                **common,
            )
            agents = agent_runner(stack, config, renderer)(
                make_env=lambda: AgentEnv(function="tests.agents.openai_loop:solve"), **common
            )
            found = []
            for uid, task in enumerate(tasks):  # one at a time, so that logprobs are equal too
                played = await made.run_episode(task, uid, uid)
                found.append((played, await agents.run_episode(task, uid, uid)))
            return found

    with ThreadPoolExecutor(8) as threads:
        pairs = asyncio.run(main())
    num_turns = [len(ours.turns) for ours, _ in pairs]
    assert max(num_turns) > 1 and sum(num_turns) > 30
    for ours, theirs in pairs:
        assert theirs.branches == ()
        assert theirs.token_ids == ours.token_ids
        assert theirs.loss_mask == ours.loss_mask
        assert theirs.rollout_logprobs == pytest.approx(ours.rollout_logprobs, abs=1e-4)
        assert theirs.reward == ours.reward
