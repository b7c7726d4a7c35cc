"""The pipe, and failures at its other end, with Gymnasium as the library."""

import os
import pickle
import signal
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gymnasium
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env

from tests.tools.sandbox.processes import wait_until
from tir_alp.envs.interop.host_process import HostError, HostProcess
from tir_alp.envs.interop.hosted_env import HostedEnv
from tir_alp.envs.interop.libraries import find_python, folder_of
from tir_alp.tools.outcome import Outcome

PATIENT = 240.0


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> str:
    """An interpreter that finds the environments of these tests, and not tir_alp."""
    script = tmp_path_factory.mktemp("bin") / "python"
    script.write_text(
        f'#!/bin/sh\nPYTHONPATH="{Path(__file__).parent}" exec {sys.executable} "$@"\n'
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return str(script)


def naughty(python: str, **kwargs: Any) -> HostedEnv:
    patient: dict[str, Any] = {"start_timeout_s": PATIENT, "step_timeout_s": PATIENT}
    patient |= {"name": "naughty_env:Naughty-v0", "python": python, **kwargs}
    env = gymnasium.make("tir_alp.envs:Hosted-v0", **patient).unwrapped
    assert isinstance(env, HostedEnv)
    return env


def test_texts_rewards_and_ends_come_through(python):
    env = naughty(python, instruction="Be good.")
    text, info = env.reset(options={"task": {"seed": 5, "question": "π?"}})
    assert text == "Be good.\n\nseed 5, task ['question', 'seed']"
    assert info == {"task": {"seed": 5, "question": "π?"}, "library_seed": 5}
    said = "π \ud800 \x00 ```\n"
    text, reward, terminated, truncated, info = env.step(f"say {said}")
    assert (text, reward, terminated, truncated) == (said, 0.0, False, False)
    assert (info["outcome"], info["library_info"]) == ("ok", {"said": said})
    assert env.step("print")[0] == "printed"
    # Both flags at once count as terminated.
    assert env.step("end 0.5")[:4] == ("", 0.5, True, False)
    with pytest.raises(ResetNeeded):
        env.step("say more")


def test_a_group_plays_the_same_game_and_another_task_another_one(python):
    first, second, other = (
        naughty(python).reset(options={"task": {"task_id": name}})[1]["library_seed"]
        for name in ("a", "a", "b")
    )
    assert first == second != other
    env = naughty(python)
    assert env.reset(seed=3) == env.reset(seed=3) != env.reset(seed=4)


def test_a_pickled_environment_opens_one_of_its_own(python):
    env = naughty(python, instruction="Be good.")
    twin = pickle.loads(pickle.dumps(env))
    assert twin.reset(seed=3) == env.reset(seed=3)
    with pytest.raises(TypeError, match="cannot be pickled in an episode, whose state is in a pro"):
        pickle.dumps(env)
    assert env.step("end 1")[2] and twin.step("say hello")[0] == "hello"
    assert pickle.loads(pickle.dumps(env)).reset(seed=3) == env.reset(seed=3)
    env.close()
    assert pickle.loads(pickle.dumps(env))._number is None


@pytest.mark.filterwarnings("error")
def test_gymnasiums_checker_finds_nothing(python):
    check_env(naughty(python), skip_render_check=True)


@pytest.mark.parametrize("action", ["raise", "cancel", "end nan"])
def test_what_the_library_cannot_score_is_no_reward(python, action):
    env, other = naughty(python), naughty(python)
    other.reset()
    env.reset()
    _, reward, terminated, truncated, info = env.step(action)
    assert (reward, terminated, truncated) == (0.0, False, True)
    assert Outcome(info["outcome"]) is Outcome.INFRA_ERROR
    assert ("what now?" in info["error"]) or ("nan" in info["error"])
    assert other.step("say on")[0] == "on"  # the process is still alive


def test_a_step_that_hangs_ends_its_process_and_the_next_episode_gets_a_new_one(python):
    env, other = naughty(python, step_timeout_s=1.0), naughty(python)
    other.reset()
    env.reset()
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(other.step, "hang")
        info = env.step("hang")[-1]
        assert info["outcome"] == "infra_error"
        assert "gave no answer to 'step' within 1 s and was killed" in info["error"]
        assert waiting.result(PATIENT)[-1]["outcome"] == "infra_error"
    env.close()
    again = naughty(python)
    again.reset(seed=1)
    assert again.step("say hello")[0] == "hello"


def test_a_process_that_dies_is_reported_with_its_error_output(python):
    env = naughty(python)
    env.reset()
    info = env.step("die")[-1]
    assert info["outcome"] == "infra_error"
    assert "ended with status 7; its error output: my last words" in info["error"]
    with pytest.raises(HostError):
        env.reset()


def test_what_cannot_be_made_or_reset_is_named(python):
    with pytest.raises(ValueError, match=r"gymnasium cannot make .*: ValueError: not today"):
        naughty(python, settings={"refuse": True})
    env = naughty(python)
    with pytest.raises(Exception, match="no such task"):
        env.reset(options={"task": {"refuse": True}})
    with pytest.raises(
        HostError, match=r"(?s)ended with status 1; .*No module named 'host_nothing'"
    ):
        HostProcess([sys.executable], "host_nothing", PATIENT)


def test_a_library_that_is_not_installed_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setenv("TIR_ALP_INTEROP", str(tmp_path))
    assert folder_of("gem") == tmp_path / "gem"
    with pytest.raises(ValueError, match="interop install verifiers"):
        find_python("verifiers")
    with pytest.raises(ValueError, match="there is no library 'gym'; there are: gem"):
        find_python("gym")


def test_the_host_ends_with_its_parent():
    program = (
        "from tir_alp.envs.interop.host_process import HostProcess\n"
        "import sys, time\n"
        f"host = HostProcess([sys.executable], 'host_gymnasium', {PATIENT})\n"
        "print(host._process.pid, flush=True)\n"
        "time.sleep(1000)\n"
    )
    ours = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert ours.stdout is not None
    pid = int(ours.stdout.readline())
    os.kill(ours.pid, signal.SIGKILL)
    ours.wait()
    wait_until(lambda: not Path(f"/proc/{pid}").exists())


def test_a_killed_process_leaves_no_thread():
    before = threading.active_count()
    host = HostProcess([sys.executable], "host_gymnasium", PATIENT)
    host.kill()
    host.kill()
    assert threading.active_count() == before
    with pytest.raises(HostError, match="has ended"):
        host.ask("open", 1.0)
