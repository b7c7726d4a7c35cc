"""MCP servers from PyPI and npm answer tool calls in an episode, and are killed during one."""

import asyncio
import json
import os
import shutil
import signal
import sys
import threading
import tomllib
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.tools.mcp_http import http_server
from tests.tools.sandbox.processes import wait_until
from tir_alp.config import Config, RolloutConfig
from tir_alp.doctor.environment import check_environment
from tir_alp.engines.base import Completion
from tir_alp.models.tiny.model import make_tokenizer
from tir_alp.rollouts.data import Task
from tir_alp.rollouts.environment import make_environment
from tir_alp.rollouts.episode import EpisodeFailed, EpisodeRunner
from tir_alp.rollouts.renderer import make_renderer
from tir_alp.run.command_line import load_config
from tir_alp.tools.outcome import Outcome
from tir_alp.types import StopReason, Trajectory

pytest.importorskip("mcp", reason="the extra `mcp` is not installed")

PATIENT = {"start_timeout_s": 240, "call_timeout_s": 240}
TOML = """\
[env]
id = "tir_alp.envs:MultiTool-v0"

[env.kwargs]
tools = ["calculator"]
tools_in_prompt = true
max_turns = 4

[[env.kwargs.mcp]]
command = ["mcp-server-time", "--local-timezone", "UTC"]
only = ["convert_time"]
"""


def config_of(**server: Any) -> Config:
    """Return the config above with another server."""
    values = tomllib.loads(TOML)
    (listed,) = values["env"]["kwargs"]["mcp"]
    if "url" in server:
        del listed["command"]
    listed |= {**PATIENT, **server}
    return load_config([], values)


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def play(
    config: Config, task: Task, action: str, output: str, break_it: Callable[[], threading.Event]
) -> tuple[Trajectory, list[EpisodeFailed]]:
    """Play two calls of a tool that outputs `output`, then the answer; break the first attempt.

    The second attempt continues once the event that `break_it` returns is set.
    """
    failures: list[EpisodeFailed] = []
    tokenizer = make_tokenizer()
    with closing(make_environment(config)) as env:
        renderer = make_renderer(config, tokenizer, env)
    check_environment(config, renderer, [task], lambda: make_environment(config))
    is_fixed: list[threading.Event] = []

    async def policy(token_ids, sampling) -> Completion:
        num_calls = tokenizer.decode(list(token_ids)).count(output)
        if num_calls == 1 and not is_fixed:
            is_fixed.append(break_it())
        if num_calls == 0 and is_fixed:
            await asyncio.to_thread(is_fixed[0].wait, 240)
        text = action if num_calls < 2 else rf"\boxed{{{task.answer}}}"
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
                make_env=lambda: make_environment(config),
                generate=policy,
                renderer=renderer,
                limits=RolloutConfig(group_size=1, max_context_tokens=8192, env_timeout_s=280),
                threads=threads,
                slots=asyncio.Semaphore(4),
                seed=0,
                on_failure=failures.append,
            )
            return await runner.run_group(task, 0)

    trajectories = asyncio.run(main()).trajectories
    assert len(trajectories) == 1, failures
    return trajectories[0], failures


def processes(mark: str) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"MARK={mark}\0".encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def kill_soon(pid: int, then: Callable[[], object] = lambda: None) -> threading.Event:
    """Stop a process, so that the next call waits, and kill it while the call is waiting."""
    os.kill(pid, signal.SIGSTOP)
    is_done = threading.Event()

    def kill() -> None:
        os.kill(pid, signal.SIGKILL)
        then()
        is_done.set()

    threading.Timer(1.0, kill).start()
    return is_done


def assert_played_again(trajectory: Trajectory, failures: list[EpisodeFailed], tool: str) -> None:
    assert [failure.outcome for failure in failures] == [Outcome.INFRA_ERROR], failures
    assert f"was lost in a call of '{tool}'" in str(failures[0])
    assert [turn.outcome for turn in trajectory.turns] == [Outcome.OK] * 3
    assert (trajectory.reward, trajectory.terminated) == (1.0, True)
    wait_until(lambda: not [each for each in threading.enumerate() if each.name == "mcp"])


def test_a_stdio_server_is_killed_during_a_call_and_the_retry_finishes():
    mark = uuid.uuid4().hex
    command = [sys.executable, "-m", "mcp_server_time", "--local-timezone", "UTC"]
    action = call("convert_time", source_timezone="UTC", time="12:00", target_timezone="Asia/Tokyo")

    def break_it() -> threading.Event:
        (pid,) = processes(mark)
        return kill_soon(pid)

    trajectory, failures = play(
        config_of(command=command, env={"MARK": mark}),
        Task("t", "How many hours is Tokyo ahead of UTC?", "9"),
        *(action, "time_difference", break_it),
    )
    assert_played_again(trajectory, failures, "convert_time")
    assert "T21:00:00+09:00" in trajectory.turns[0].info["observation"]
    wait_until(lambda: not processes(mark))


@pytest.mark.skipif(not shutil.which("mcp-server-everything"), reason="npm's server is not there")
def test_an_http_server_is_killed_during_a_call_and_the_retry_finds_its_successor():
    def command(port: int) -> list[str]:
        return ["mcp-server-everything", "streamableHttp"]

    with ExitStack() as servers:
        url, process = servers.enter_context(http_server(command))

        def restart() -> None:
            process.wait()
            servers.enter_context(http_server(command, urlsplit(url).port))

        trajectory, failures = play(
            config_of(url=url, only=["get-sum"]),
            Task("t", "What is 2+3?", "5"),
            *(call("get-sum", a=2, b=3), "The sum of 2 and 3 is 5."),
            lambda: kill_soon(process.pid, restart),
        )
    assert_played_again(trajectory, failures, "get-sum")


@pytest.mark.parametrize(
    ("mcp", "message"),
    [
        ({"command": ["true"]}, r"^env\.kwargs\.mcp is a list of servers"),
        ([{"commando": ["true"]}], r"^env\.kwargs\.mcp\[0\]: commando: Extra inputs"),
        ([{"command": "mcp-server-time"}], r"^env\.kwargs\.mcp\[0\]: command: .* valid tuple"),
        ([{}], r"^env\.kwargs\.mcp\[0\]: .* either a command \(stdio\) or a url"),
        ([{"command": ["no-such-server"]}], r"^env\.kwargs\.mcp\[0\]: .* did not start: .*not fo"),
    ],
)
def test_a_malformed_server_is_reported_with_its_key_path(mcp, message):
    config = load_config([], {"env": {"id": "tir_alp.envs:MultiTool-v0", "kwargs": {"mcp": mcp}}})
    with pytest.raises(ValueError, match=message):
        make_environment(config)


def test_two_tools_of_one_name_are_refused():
    command = [sys.executable, "-m", "mcp_server_time", "--local-timezone", "UTC"]
    with pytest.raises(ValueError, match=r"need different names, not \['calculator', 'conv"):
        kwargs = config_of(command=command).env.kwargs
        server = kwargs["mcp"][0]
        values = {"id": "tir_alp.envs:MultiTool-v0", "kwargs": kwargs | {"mcp": [server, server]}}
        make_environment(load_config([], {"env": values}))
