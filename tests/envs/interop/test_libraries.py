"""Real environments of real libraries, if they are installed: rules, rewards, exact tokens.

`python -m tir_alp.envs.interop install LIBRARY` installs one; without it, its tests are skipped.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gymnasium
import pytest
from gymnasium.utils.env_checker import check_env

from tests.runs import assert_honest, train_with
from tests.tools.sandbox.processes import wait_until
from tir_alp.envs.interop.libraries import folder_of
from tir_alp.models.tiny import TRAIN_CONFIG
from tir_alp.rollouts.data import Task
from tir_alp.run.command_line import load_config, read_toml
from tir_alp.train import main

TASKS = [Task(f"t{number}", f"What is 6*{number}?", str(6 * number)) for number in (7, 8)]
PATIENT = {"start_timeout_s": 600.0, "step_timeout_s": 600.0}

pytestmark = pytest.mark.timeout(1200)  # a large library takes long to import on a busy machine


def needs(library: str) -> pytest.MarkDecorator:
    reason = f"`python -m tir_alp.envs.interop install {library}` was not run here"
    return pytest.mark.skipif(not (folder_of(library) / "bin" / "python").exists(), reason=reason)


def make(env_id: str, **kwargs: Any) -> gymnasium.Env[str, str]:
    return gymnasium.make(f"tir_alp.envs:{env_id}", disable_env_checker=True, **kwargs)


def check(env_id: str, **kwargs: Any) -> None:
    """Assert that Gymnasium's checker finds nothing, not even a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = make(env_id, **kwargs)
        check_env(env.unwrapped, skip_render_check=True)
        env.close()


SMALL = (
    *("--steps", "1", "--rollout.groups_per_step", "2", "--rollout.group_size", "2"),
    *("--rollout.max_turn_tokens", "32", "--rollout.env_timeout_s", "600"),
    *("--eval.num_tasks", "1", "--eval.greedy", "false"),
)


def trained(
    folder: Path, env_id: str, kwargs: dict[str, Any], max_context_tokens: int
) -> list[dict[str, Any]]:
    """Train one step on an environment and audit the run; return the recorded trajectories."""
    words = ["--env.id", f"tir_alp.envs:{env_id}", "--env.kwargs", json.dumps(kwargs), *SMALL]
    words += ["--rollout.max_context_tokens", str(max_context_tokens)]
    words += [
        "--doctor.ignore",
        '["tokenizer"]',
    ]  # one token per byte, so some prompts are very long
    run = train_with(folder, load_config(words, read_toml(TRAIN_CONFIG)))
    assert_honest(run)
    recorded = (run / "trajectories" / "step_000001.jsonl").read_text().splitlines()
    assert len(recorded) == 4
    return [json.loads(line) for line in recorded]


# -------------------------------------------------------------------------------------------- GEM

GUESS = {"name": "game:GuessTheNumber-v0-hard", **PATIENT}


@needs("gem")
def test_a_game_of_gem_is_won_by_halving():
    env = make("Gem-v0", **GUESS)
    text, info = env.reset(options={"task": {"task_id": "game 1"}})
    assert "between 1 and 50 (inclusive) within 7 turns" in text
    low, high, rewards = 1, 50, []
    while True:
        guess = (low + high) // 2
        text, reward, terminated, truncated, _ = env.step(rf"\boxed{{{guess}}}")
        rewards.append(reward)
        if terminated or truncated:
            break
        low, high = (guess + 1, high) if "higher" in text else (low, guess - 1)
    assert (terminated, truncated) == (True, False)
    assert rewards == [0.0] * (len(rewards) - 1) + [1.0]
    _, info_again = env.reset(options={"task": {"task_id": "game 1"}})
    assert info_again == info and env.step(rf"\boxed{{{guess}}}")[1] == 1.0
    env.close()


@needs("gem")
def test_gem_passes_gymnasiums_checker():
    check("Gem-v0", **GUESS)


@needs("gem")
def test_gem_is_trained_on_by_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--name", "gem", "--env.id", "tir_alp.envs:Gem-v0", *SMALL]
    words += ["--env.kwargs", json.dumps(GUESS), "--rollout.max_context_tokens", "1024"]
    assert main(words) == 0
    run = tmp_path / "runs" / "gem"
    assert_honest(run)
    (environment,) = map(json.loads, (run / "environment.jsonl").read_text().splitlines())
    assert environment["libraries"] == {"gem": "0.1.0"}
    recorded = (run / "trajectories" / "step_000001.jsonl").read_text().splitlines()
    assert len(recorded) == 4
    assert all("you did not provide a valid guess" in line for line in recorded)


# -------------------------------------------------------------------------------------- SkyRL-Gym

GSM8K = {"name": "gsm8k_multi_turn", "settings": {"extras": {"max_turns": 3}}, **PATIENT}


@needs("skyrl-gym")
def test_skyrl_gym_scores_given_tasks_by_its_own_rules():
    env = make("SkyRLGym-v0", **GSM8K)
    text, _ = env.reset(options=TASKS[0].to_options())
    assert text == "What is 6*7?"
    text, reward, *ends, _ = env.step("#### 41")
    assert "tentative numeric answer" in text and ends == [False, False]
    assert reward == pytest.approx(0.2 / 3)  # for the format
    assert env.step("#### 42")[:4] == ("", 1.0, True, False)
    with pytest.raises(Exception, match="no tasks of its own"):
        env.reset()
    env.close()
    check("SkyRLGym-v0", **{**GSM8K, "settings": {"task": TASKS[0].to_options()["task"]}})
    with pytest.raises(ValueError, match=r"there is no environment of that name; there are: aime"):
        make("SkyRLGym-v0", **{**GSM8K, "name": "gsm9k"})


@needs("skyrl-gym")
def test_skyrl_gym_is_trained_on_and_every_token_is_accounted_for(tmp_path):
    trajectories = trained(tmp_path, "SkyRLGym-v0", GSM8K, 1024)
    assert max(len(trajectory["turns"]) for trajectory in trajectories) == 3


# -------------------------------------------------------------------------------------- verifiers


@pytest.fixture
def hangman(tmp_path, monkeypatch) -> dict[str, Any]:
    """Hangman of TextArena, through the taskset that comes with verifiers.

    Its words come from a hub that may be out of reach; here are some.
    """
    if not list(folder_of("verifiers").glob("lib/python*/site-packages/textarena")):
        pytest.skip("textarena is not installed beside verifiers")
    words = tmp_path / "nltk" / "corpora" / "words"
    words.mkdir(parents=True)
    for name in ("en", "en-basic"):
        (words / name).write_text("crane\nslate\nabout\nother\n")
    monkeypatch.setenv("NLTK_DATA", str(tmp_path / "nltk"))
    settings = {"taskset": {"game": "Hangman-v0"}, "num_tasks": 4}
    return {"name": "textarena", "settings": settings, **PATIENT}


@needs("verifiers")
def test_a_user_of_verifiers_answers_and_scores(hangman):
    env = make("Verifiers-v0", **hangman)
    text, _ = env.reset(options={"task": {"task_id": "t"}})
    assert text.startswith("You are a competitive game player") and "_   _   _   _   _" in text
    board, total, ended = "", 0.0, False
    for letter in "cranesltbouhi":
        board, reward, ended, truncated, info = env.step(f"My letter is [{letter}].")
        total += float(reward)
        if ended or truncated:
            break
        assert re.search(r"C00 C01 C02 C03 C04", board) or "letter" in board
    assert ended and 0 < total <= 1
    assert info["library_info"]["stop_condition"] == "user_closed"
    env.reset(options={"task": {"index": 1}})  # an episode abandoned for another
    env.close()
    check("Verifiers-v0", **hangman)


@needs("verifiers")
def test_verifiers_is_trained_on_and_every_token_is_accounted_for(hangman, tmp_path):
    trajectories = trained(tmp_path, "Verifiers-v0", hangman, 1536)
    assert max(len(trajectory["turns"]) for trajectory in trajectories) > 1


# ---------------------------------------------------------------------------------------- OpenEnv


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def served(command: list[str], port: int, **settings: Any) -> Iterator[str]:
    """Run a server; yield its address once it responds."""
    process = subprocess.Popen(command, **settings)
    address = f"http://127.0.0.1:{port}"

    def is_up() -> bool:
        assert process.poll() is None, f"it ended with status {process.returncode}"
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    try:
        wait_until(is_up, within_s=600)
        yield address
    finally:
        process.terminate()
        process.wait(60)


@needs("openenv")
def test_an_openenv_server_is_trained_on_and_every_token_is_accounted_for(tmp_path):
    """Serve the environment that OpenEnv's own template makes."""
    python = folder_of("openenv") / "bin" / "python"
    template = subprocess.run(
        [python, "-c", "import openenv.cli.templates as t; print(t.__path__[0])"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    shutil.copytree(Path(template) / "openenv_env", tmp_path / "echoes")
    for file in tmp_path.rglob("*.py"):
        text = file.read_text()
        for placeholder, word in {
            "__ENV_NAME__": "echoes",
            "__ENV_CLASS_NAME__": "Echoes",
            "__ENV_TITLE_NAME__": "Echoes",
            "max_concurrent_envs=1": "max_concurrent_envs=8",
        }.items():
            text = text.replace(placeholder, word)
        file.with_name(file.name.replace("__ENV_NAME__", "echoes")).write_text(text)
    port = free_port()
    command = [str(python), "-m", "uvicorn", "echoes.server.app:app", "--port", str(port)]
    with served(command, port, cwd=tmp_path) as address:
        kwargs = {
            "name": address,
            "settings": {"action_field": "message", "observation_field": "echoed_message"},
            **PATIENT,
        }
        env = make("OpenEnv-v0", **kwargs)
        assert env.reset()[0] == "Echoes environment ready!"
        text, reward, *_, info = env.step("six")
        assert (text, reward) == ("six", pytest.approx(0.3))
        assert info["library_info"]["message_length"] == 3
        env.close()
        as_json = make("OpenEnv-v0", name=address, **PATIENT)
        assert json.loads(as_json.reset()[0])["message_length"] == 0
        text, *_, info = as_json.step("six")
        assert text.startswith("[an action is a JSON object: ")
        assert info["outcome"] == "tool_error"
        text = as_json.step('So:\n```json\n{"message": "six"}\n```')[0]
        assert json.loads(text) == {"echoed_message": "six", "message_length": 3}
        as_json.close()
        check("OpenEnv-v0", **kwargs)
        # The episode never ends by itself, and every turn reads the whole context.
        trajectories = trained(tmp_path, "OpenEnv-v0", kwargs, max_context_tokens=256)
        assert all(len(trajectory["turns"]) > 1 for trajectory in trajectories)


def posted(address: str, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    request = urllib.request.Request(
        f"{address}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


@needs("openenv")
def test_what_a_client_of_our_openenv_server_may_not_do_is_answered_with_the_reason():
    port = free_port()
    command = [sys.executable, "-m", "tir_alp.envs.interop", "serve"]
    command += ["tir_alp.envs:SingleTurnMath-v0", "--port", str(port)]
    with served(command, port, env=os.environ | {"PYTHONPATH": os.getcwd()}) as address:
        status, answer = posted(address, "/step", {"action": {"text": "hello"}})
        assert status == 409 and answer["detail"].startswith("no episode is under way: reset")
        status, answer = posted(address, "/reset", {"task": {"question": "only"}})
        assert status == 400 and "a task of SingleTurnMathEnv needs 'answer'" in answer["detail"]
        status, answer = posted(address, "/step", {"action": {"words": "hello"}})
        assert status == 422
        status, answer = posted(address, "/reset", {"seed": 3})
        assert status == 200 and answer["observation"]["text"]
        through = {"name": address, "settings": {"action_field": "text"}, **PATIENT}
        env = make("OpenEnv-v0", **through)
        env.reset(seed=3)
        assert env.step("no answer")[2]
        env.close()


@needs("openenv")
@pytest.mark.sandbox
def test_an_environment_of_tir_alp_is_served_by_openenv_and_trained_on(tmp_path):
    port = free_port()
    kwargs = json.dumps({"instruction": "", "max_turns": 3, "sandbox": {"preload": []}})
    command = [sys.executable, "-m", "tir_alp.envs.interop", "serve"]
    command += ["tir_alp.envs:PythonMath-v0", "--kwargs", kwargs, "--port", str(port)]
    with served(command, port, env=os.environ | {"PYTHONPATH": os.getcwd()}) as address:
        validate = [str(folder_of("openenv") / "bin" / "openenv"), "validate", "--url", address]
        report = subprocess.run(validate, capture_output=True, text=True, timeout=600)
        assert report.returncode == 0 and "Verdict: PASS" in report.stdout, report.stdout
        through = {
            "name": address,
            "settings": {"action_field": "text", "observation_field": "text", "send_task": True},
            **PATIENT,
        }
        env = make("OpenEnv-v0", **through)
        assert env.reset(options=TASKS[0].to_options())[0] == "What is 6*7?"
        assert env.step("```python\nprint(6*7)\n```")[:4] == ("42", 0.0, False, False)
        assert env.step(r"\boxed{42}")[:4] == ("", 1.0, True, False)
        env.reset(options=TASKS[1].to_options())
        call = "```python\n1\n```"
        assert [env.step(call)[2:4] for _ in range(3)][-1] == (False, True)  # max_turns
        assert env.reset(seed=3)[0] == env.reset(seed=3)[0] != env.reset(seed=4)[0]
        env.close()
        trained(tmp_path, "OpenEnv-v0", through, 1024)
        check("OpenEnv-v0", **through)
