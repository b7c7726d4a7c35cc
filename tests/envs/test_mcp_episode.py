"""An MCP server from PyPI answers tool calls in an episode, and is killed in one."""

import asyncio
import json
import os
import signal
import sys
import threading
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.tools.processes import wait_until
from tir_alp.config import RolloutConfig
from tir_alp.data import Task
from tir_alp.engines.base import Completion
from tir_alp.envs.grading import Grade
from tir_alp.envs.tool_env import ToolEnv
from tir_alp.renderer import Renderer
from tir_alp.rollout import EpisodeFailed, EpisodeRunner
from tir_alp.tiny.model import make_tokenizer
from tir_alp.tools.outcome import Outcome
from tir_alp.types import StopReason

pytest.importorskip("mcp", reason="the extra `mcp` is not installed")

from tir_alp.tools.mcp import McpServer, McpSession, McpTool, mcp_tools

SERVER = McpServer(
    command=(sys.executable, "-m", "mcp_server_time", "--local-timezone", "UTC"),
    env={"MARK": uuid.uuid4().hex},
    start_timeout_s=240,
    call_timeout_s=240,
)
TASK = Task("t", "What is 12:00 UTC in Tokyo?", "21:00")
CALL = (
    '```python\n{"source_timezone": "UTC", "time": "12:00", "target_timezone": "Asia/Tokyo"}\n```'
)


class InAFence:
    """The arguments of one MCP tool as what stands in a Python block."""

    name = "python"
    description = ""
    parameters: Mapping[str, Any] = {"type": "object", "properties": {"code": {"type": "string"}}}

    def __init__(self, inner: McpTool):
        self.inner = inner

    def open_session(self) -> McpSession:
        return self.inner.open_session()

    def run(self, arguments, session):
        return self.inner.run(json.loads(arguments["code"]), session)


class Clock(ToolEnv):
    """Questions about the time."""

    def __init__(self) -> None:
        (tool,) = mcp_tools(SERVER, only=["convert_time"])
        super().__init__(tools=[InAFence(tool)], tasks=[TASK.to_options()["task"]], max_turns=4)

    def prompt(self, task):
        return task["question"]

    def grade(self, task, answer):
        return Grade(correct=answer == task["answer"])


def server_processes() -> list[int]:
    mark = f"MARK={SERVER.env['MARK']}\0".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def test_the_server_is_killed_in_mid_call_and_the_next_attempt_plays_to_the_end():
    failures: list[EpisodeFailed] = []
    tokenizer = make_tokenizer()
    victims: list[int] = []

    async def policy(token_ids, sampling) -> Completion:
        """Calls twice, then answers; in its first episode, the second call kills the server."""
        num_calls = tokenizer.decode(list(token_ids)).count("time_difference")
        if num_calls == 1 and not failures and not victims:
            (pid,) = server_processes()
            victims.append(pid)
            os.kill(pid, signal.SIGSTOP)  # so that the call waits
            threading.Timer(1.0, os.kill, (pid, signal.SIGKILL)).start()
        text = CALL if num_calls < 2 else r"\boxed{21:00}"
        ids = tuple(tokenizer.encode(text, add_special_tokens=False))
        return Completion(
            token_ids=ids,
            logprobs=(-0.5,) * len(ids),
            stop_reason=StopReason.STOP,
            policy_version=0,
        )

    async def main():
        with ThreadPoolExecutor(4) as threads:
            runner = EpisodeRunner(
                make_env=Clock,
                generate=policy,
                renderer=Renderer(make_tokenizer(), max_observation_tokens=1000),
                limits=RolloutConfig(group_size=1, max_context_tokens=4096, env_timeout_s=280),
                threads=threads,
                slots=asyncio.Semaphore(4),
                seed=0,
                on_failure=failures.append,
            )
            return await runner.run_group(TASK, 0)

    (trajectory,) = asyncio.run(main()).trajectories
    assert [failure.outcome for failure in failures] == [Outcome.INFRA_ERROR]
    assert "was lost in a call of 'convert_time'" in str(failures[0])
    assert [turn.outcome for turn in trajectory.turns] == [Outcome.OK] * 3
    assert "T21:00:00+09:00" in trajectory.turns[0].info["observation"]
    assert (trajectory.reward, trajectory.terminated) == (1.0, True)
    wait_until(lambda: not server_processes())
    assert not [thread for thread in threading.enumerate() if thread.name == "mcp"]
