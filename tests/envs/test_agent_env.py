"""Agents as commands and functions: what they get, how they end, and what is left of them."""

import asyncio
import json
import os
import sys
import threading
import time
import warnings

import gymnasium
import pytest
from gymnasium.utils.env_checker import check_env

from tir_alp.envs.agent_env import AgentEnv
from tir_alp.envs.agent_process import MARK, Report, marked_processes

TASK = {"task_id": "t", "question": "6*7?", "answer": "42"}
VARIABLES = {"OPENAI_BASE_URL": "http://127.0.0.1:1/v1", "OPENAI_API_KEY": "sk-1"}


def python(code: str, **settings) -> AgentEnv:
    env = AgentEnv(command=[sys.executable, "-c", code], **settings)
    env.reset(options={"task": TASK})
    return env


def played(env: AgentEnv):
    report = env.play(VARIABLES)
    return Report.from_text(report), env.step(report)


async def right(task, variables):
    await asyncio.sleep(0)
    return f"{task['question']} \\boxed{{42}} by {variables['OPENAI_API_KEY']}"


async def raises(task, variables):
    raise OSError("no model")


async def sleeps(task, variables):
    await asyncio.sleep(60)


def lengths(task, report):
    return len(report["files"].get("out.txt", ""))


def test_the_answer_is_the_last_line_or_a_file():
    report, (_, reward, terminated, truncated, info) = played(python("print('so');print(42)"))
    assert (report.answer, reward, terminated, truncated) == ("42", 1.0, True, False)
    assert info["correct"] and info["rewards"] == {"answer": 1.0}
    code = "open('answer.txt','w').write('42');print(41)"
    assert played(python(code))[1][1] == 1.0
    assert played(python("print(41)"))[1][1] == 0.0


def test_an_agent_sees_the_task_without_its_answer_and_no_secrets(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "x")
    code = "import os,json;print(json.dumps([dict(os.environ), json.load(open('task.json'))]))"
    report, _ = played(python(code))
    variables, task = json.loads(report.answer or "")
    assert task == json.loads(variables["TIR_ALP_TASK"]) == {"task_id": "t", "question": "6*7?"}
    assert variables["OPENAI_API_KEY"] == "sk-1" and "SECRET_TOKEN" not in variables


def test_a_crash_is_an_outcome_of_the_agent():
    report, (_, reward, terminated, _, info) = played(python("raise SystemError('bad')"))
    assert (report.end, info["outcome"], reward, terminated) == ("failed", "tool_error", 0.0, True)
    assert "bad" in info["error"]


def test_a_command_that_does_not_exist_is_no_reward():
    env = AgentEnv(command=["/no/such/agent"])
    env.reset(options={"task": TASK})
    _, (_, _, _, truncated, info) = played(env)
    assert truncated and info["outcome"] == "infra_error" and info["rewards"] == {}


def test_a_late_agent_is_ended():
    began = time.monotonic()
    env = python("import time\nprint(42, flush=True)\ntime.sleep(60)", timeout_s=0.5)
    report, (_, reward, terminated, truncated, info) = played(env)
    assert time.monotonic() - began < 20
    assert (report.end, info["outcome"]) == ("timeout", "tool_timeout")
    assert (reward, terminated, truncated) == (0.0, False, True)


HIDES = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = "import signal,time;signal.signal(signal.SIGTERM,signal.SIG_IGN);time.sleep(60)"
print(os.environ[{mark!r}], os.getcwd(), flush=True)
subprocess.Popen([sys.executable, "-c", child], start_new_session=True)
subprocess.Popen([sys.executable, "-c", child])
open("left.txt", "w").write("x")
time.sleep({sleep})
"""


@pytest.mark.parametrize("sleep", [0, 60])
def test_nothing_of_an_agent_is_left(sleep):
    report, _ = played(python(HIDES.format(mark=MARK, sleep=sleep), timeout_s=1.5))
    assert report.end == ("timeout" if sleep else "exited")
    mark, folder = report.output.split()
    assert marked_processes(mark) == []
    assert not os.path.exists(folder)


def test_an_agent_that_prints_without_end_is_ended(monkeypatch):
    monkeypatch.setattr("tir_alp.envs.agent_process.MAX_OUTPUT_BYTES", 1 << 16)
    report, _ = played(python("while True: print('x' * 1000, flush=True)"))
    assert report.end == "failed" and 0 < len(report.output) <= 1 << 16


def test_an_agent_can_be_stopped_from_outside():
    env = python("import time;time.sleep(60)")
    threading.Timer(0.3, env.stop).start()
    began = time.monotonic()
    assert played(env)[0].end == "timeout"
    assert time.monotonic() - began < 20


def test_functions_answer_fail_and_are_late():
    def ended(name, **settings):
        env = AgentEnv(function=f"{__name__}:{name}", **settings)
        env.reset(options={"task": TASK})
        return played(env)

    report, (_, reward, *_) = ended("right")
    assert report.answer == "6*7? \\boxed{42} by sk-1" and reward == 1.0
    report, (*_, info) = ended("raises")
    assert info["outcome"] == "tool_error" and report.errors == "OSError: no model"
    assert ended("sleeps", timeout_s=0.3)[0].end == "timeout"


def test_a_verifier_of_ones_own_reads_files():
    code = "open('out.txt','w').write('abc')"
    env = python(code, verifier=f"{__name__}:lengths", files=["out.txt", "missing.txt"])
    assert played(env)[1][1] == 3.0


def test_a_verifier_that_raises_is_no_verdict():
    env = python("print(1)", verifier=f"{__name__}:missing_key")
    _, (_, _, _, truncated, info) = played(env)
    assert truncated and info["outcome"] == "grader_error" and "KeyError" in info["error"]


def missing_key(task, report):
    return task["nothing"]


def test_a_link_out_of_the_folder_is_not_read(tmp_path):
    (tmp_path / "secret").write_text("42")
    code = f"import os;os.symlink({str(tmp_path / 'secret')!r}, 'answer.txt')"
    assert played(python(code))[1][1] == 0.0


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"command": "x", "function": "a:b"},
        {"function": "tests.none:solve"},
        {"command": "x", "verifier": "json:nothing"},
        {"command": "x", "timeout_s": 0},
        {"function": f"{__name__}:lengths"},
    ],
)
def test_wrong_settings_are_refused(settings):
    with pytest.raises(ValueError, match=r"env\.kwargs"):
        AgentEnv(**settings)


@pytest.mark.parametrize(
    "agent", [{"command": "true"}, {"function": f"{__name__}:right"}, {"image": "no/such:image"}]
)
def test_gymnasiums_checker_finds_nothing(agent):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for mode in (None, "ansi"):
            env = gymnasium.make("tir_alp.envs:Agent-v0", render_mode=mode, **agent)
            check_env(env.unwrapped, skip_render_check=mode is None)
            env.close()


def test_it_is_an_environment_by_its_id():
    env = gymnasium.make("tir_alp.envs:Agent-v0", command="true", disable_env_checker=True)
    text, info = env.reset(options={"task": TASK})
    assert json.loads(text) == {"task_id": "t", "question": "6*7?"} and info["task"] == TASK
    assert env.step("42")[1] == 1.0
