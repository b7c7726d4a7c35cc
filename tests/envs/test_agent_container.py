"""Agents in containers of a real engine: they reach the gateway, and nothing of them is left."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("docker")
pytest.importorskip("openai")

from tests.agents.templates import Scripted, encoder, tokenizer
from tests.agents.test_runner import ASKS
from tests.tools.sandbox.docker_engine import (
    BASE_IMAGE,
    ContainerEngineUnavailable,
    docker_engine,
    leftovers,
    make_base_image,
)
from tir_alp.agents.gateway import Gateway
from tir_alp.agents.runner import AgentRunner
from tir_alp.config import AgentsConfig, RolloutConfig
from tir_alp.envs.agent_container import LABEL
from tir_alp.envs.agent_env import AgentEnv
from tir_alp.envs.agent_process import Report
from tir_alp.rollouts.data import Task
from tir_alp.rollouts.renderer import Renderer

pytestmark = pytest.mark.sandbox

TASK = {"task_id": "t", "question": "6*7?", "answer": "42"}


@pytest.fixture(scope="module")
def client():
    with contextlib.ExitStack() as stack:
        try:
            engine = stack.enter_context(docker_engine())
            make_base_image(engine)
        except ContainerEngineUnavailable as error:
            pytest.skip(f"no Docker engine: {error}")
        with pytest.MonkeyPatch.context() as patch, contextlib.closing(engine.client()) as client:
            patch.setenv("DOCKER_HOST", engine.address)
            yield client
        stack.close()
        assert leftovers(engine) == []


def containers(client):
    return client.containers.list(all=True, filters={"label": LABEL})


def played(code, **settings):
    env = AgentEnv(image=BASE_IMAGE, command=["python3", "-c", code], **settings)
    env.reset(options={"task": TASK})
    report = env.play({"OPENAI_API_KEY": "sk-1"})
    return Report.from_text(report), env.step(report)


def test_it_reaches_the_gateway_from_its_container(client):
    async def main():
        gateway = Gateway(encoder())
        runner = AgentRunner(
            make_env=lambda: AgentEnv(image=BASE_IMAGE, command=["python3", "-c", ASKS]),
            generate=Scripted("42").generate,
            renderer=Renderer(tokenizer(), call_format="none"),
            limits=RolloutConfig(max_turn_tokens=50, max_context_tokens=200),
            threads=threads,
            slots=asyncio.Semaphore(4),
            seed=3,
            on_failure=print,
            gateway=gateway,
            agents=AgentsConfig(),
        )
        try:
            return await runner.run_episode(Task("t7", "6*7?", "42"), 5, 10)
        finally:
            await gateway.close()

    with ThreadPoolExecutor(4) as threads:
        trajectory = asyncio.run(main())
    assert trajectory.reward == 1.0 and len(trajectory.turns) == 1
    assert containers(client) == []


def test_its_files_and_variables_are_its_own_and_its_answer_is_a_file_or_the_last_line(client):
    code = """
import json, os, sys
folder = os.environ["TIR_ALP_FOLDER"]
task = json.load(open(folder + "/task.json"))
print(json.dumps([task, json.loads(os.environ["TIR_ALP_TASK"]), sorted(os.environ)]))
print("so", file=sys.stderr)
open(folder + "/answer.txt", "w").write("42\\n")
open(folder + "/out.txt", "w").write("x" * 100000)
os.symlink("/etc/passwd", folder + "/link.txt")
os.mkdir(folder + "/folder.txt")
"""
    files = ["out.txt", "link.txt", "folder.txt", "missing.txt"]
    report, (_, reward, terminated, *_) = played(code, files=files, container={"user": "65534"})
    assert (report.end, report.exit_code, report.answer, reward) == ("exited", 0, "42", 1.0)
    assert terminated and report.errors == "so\n"
    assert report.files == {"out.txt": "x" * 65536}
    task, variable, names = json.loads(report.output)
    assert task == variable == {"task_id": "t", "question": "6*7?"}
    assert "OPENAI_API_KEY" in names and "DOCKER_HOST" not in names
    assert played("print(41);print(42)")[1][1] == 1.0


@pytest.mark.parametrize(
    "code, end, outcome",
    [
        ("raise SystemExit(3)", "failed", "tool_error"),
        ("import time;print(42, flush=True);time.sleep(60)", "timeout", "tool_timeout"),
        ("while True: print('x' * 1000)", "timeout", "tool_timeout"),
    ],
)
def test_its_ends_are_outcomes_and_nothing_is_left(client, code, end, outcome):
    report, (*_, info) = played(code, timeout_s=2.0)
    assert (report.end, info["outcome"]) == (end, outcome)
    assert len(report.output) <= 65536 and containers(client) == []


def test_it_can_be_stopped_from_outside(client):
    env = AgentEnv(image=BASE_IMAGE, command="sleep 60")
    env.reset(options={"task": TASK})
    threading.Timer(1.0, env.stop).start()
    began = time.monotonic()
    assert Report.from_text(env.play({})).end == "timeout"
    assert time.monotonic() - began < 30 and containers(client) == []


def test_an_image_or_engine_that_is_missing_is_no_reward(client, monkeypatch):
    for address in (os.environ["DOCKER_HOST"], "unix:///no/such/docker.sock"):
        monkeypatch.setenv("DOCKER_HOST", address)
        env = AgentEnv(image="no/such:image")
        env.reset(options={"task": TASK})
        report = env.play({})
        *_, truncated, info = env.step(report)
        assert truncated and info["outcome"] == "infra_error" and info["rewards"] == {}
        assert "'no/such:image'" in info["error"] and address in info["error"]


def test_the_container_of_a_killed_process_is_removed_by_the_next_one(client):
    code = (
        "from tir_alp.envs.agent_env import AgentEnv;"
        f"env = AgentEnv(image={BASE_IMAGE!r}, command='sleep 60');"
        "env.reset(options={'task': {}});env.play({})"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while not any(each.status == "running" for each in containers(client)):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    (theirs,) = containers(client)
    subprocess.run([sys.executable, "-c", code.replace("sleep 60", "true")], check=True)
    assert [each.id for each in containers(client)] == [theirs.id]  # its owner lives
    process.kill()
    process.wait()
    subprocess.run([sys.executable, "-c", code.replace("sleep 60", "true")], check=True)
    assert containers(client) == []


@pytest.mark.parametrize("settings", [{"command": "x", "container": {"user": "1"}}])
def test_wrong_settings_are_refused(settings):
    with pytest.raises(ValueError, match=r"env\.kwargs"):
        AgentEnv(**settings)
