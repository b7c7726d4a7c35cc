"""How episodes of agents end: late, silent, cancelled, or with an engine that fails."""

import asyncio
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("openai")

from tests.agents.templates import Scripted, encoder, tokenizer
from tir_alp.agents.gateway import Gateway
from tir_alp.agents.runner import AgentRunner
from tir_alp.config import AgentsConfig, Config, RolloutConfig
from tir_alp.envs.agent_env import AgentEnv
from tir_alp.envs.agent_process import MARK, marked_processes
from tir_alp.records.trajectories import from_record, to_record
from tir_alp.rollouts.data import Task
from tir_alp.rollouts.episode import EpisodeFailed
from tir_alp.rollouts.renderer import Renderer, make_renderer
from tir_alp.tools.outcome import Outcome

TASK = Task("t7", "6*7?", "42")

ASKS = """
import json, os, sys, time, urllib.request
url = os.environ["OPENAI_BASE_URL"] + "/chat/completions"
body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "6*7?"}]}).encode()
headers = {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"]}
reply = json.load(urllib.request.urlopen(urllib.request.Request(url, body, headers)))
print(reply["choices"][0]["message"]["content"], flush=True)
"""


def play(engine: Scripted, code: str, work: Any = None, **settings: Any) -> tuple[Any, list[Any]]:
    """Play an episode of a Python program; `work` gets the runner in place of that."""

    async def main() -> Any:
        gateway = Gateway(encoder())
        runner = AgentRunner(
            make_env=lambda: AgentEnv(command=[sys.executable, "-c", code], **settings),
            generate=engine.generate,
            renderer=Renderer(tokenizer(), call_format="none"),
            limits=RolloutConfig(max_turn_tokens=50, max_context_tokens=200, group_size=2),
            threads=threads,
            slots=asyncio.Semaphore(4),
            seed=3,
            on_failure=failures.append,
            gateway=gateway,
            agents=AgentsConfig(),
        )
        try:
            return await (work(runner) if work else runner.run_episode(TASK, 5, 10))
        finally:
            await gateway.close()

    failures: list[Any] = []
    with ThreadPoolExecutor(4) as threads:
        return asyncio.run(main()), failures


def test_a_program_without_a_client_library_is_an_agent():
    trajectory, _ = play(Scripted("42"), ASKS)
    assert trajectory.reward == 1.0 and trajectory.terminated and len(trajectory.turns) == 1
    timing = trajectory.turns[0].timing
    assert timing["generate"] > 0 and timing["queue"] == 0  # this engine answers at once
    assert from_record(json.loads(json.dumps(to_record(trajectory)))) == trajectory


def test_a_group_of_agents_is_sampled_with_own_draws():
    engine = Scripted("42", "41")
    group, _ = play(engine, ASKS, lambda runner: runner.run_group(TASK, 5))
    assert sorted(group.rewards) == [0.0, 1.0]
    assert {sampling.sequence_uid for _, sampling in engine.calls} == {10, 11}


def test_a_late_agent_is_truncated_and_its_tokens_are_kept():
    trajectory, _ = play(Scripted("42"), ASKS + "time.sleep(60)", timeout_s=3.0)
    assert (trajectory.terminated, trajectory.truncated, trajectory.reward) == (False, True, 0.0)
    assert trajectory.turns[-1].outcome is Outcome.TOOL_TIMEOUT


@pytest.mark.parametrize("code", ["print(42)", "raise SystemExit(3)"])
def test_a_silent_agent_is_no_trajectory(code):
    with pytest.raises(EpisodeFailed, match="without a completion of the model"):
        play(Scripted("42"), code)
    group, failures = play(Scripted("42"), code, lambda runner: runner.run_group(TASK, 5))
    assert group.num_failed == 2 and len(failures) == 4


class Broken(Scripted):
    async def generate(self, token_ids, sampling):
        raise RuntimeError("out of memory")


def test_an_engine_that_fails_is_no_reward():
    with pytest.raises(EpisodeFailed, match="out of memory") as caught:
        play(Broken("42"), ASKS)
    assert caught.value.outcome is Outcome.INFRA_ERROR


def test_a_cancelled_episode_ends_its_agent(tmp_path):
    code = f"import os,time;open({str(tmp_path / 'mark')!r},'w').write(os.environ[{MARK!r}])"

    async def work(runner):
        running = asyncio.create_task(runner.run_episode(TASK, 5, 10))
        while not (tmp_path / "mark").exists() or not (tmp_path / "mark").read_text():
            await asyncio.sleep(0.05)
        mark = (tmp_path / "mark").read_text()
        assert marked_processes(mark)
        running.cancel()
        for _ in range(100):
            if not marked_processes(mark):
                return running
            await asyncio.sleep(0.1)
        raise AssertionError("the agent goes on")

    running, _ = play(Scripted("42"), code + ";time.sleep(60)", work)
    assert running.cancelled()


def test_a_template_that_rewrites_history_is_no_obstacle():
    env = AgentEnv(command="true")
    assert make_renderer(Config(), tokenizer("drops"), env).call_format == "none"
