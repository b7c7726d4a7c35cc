"""The examples of docs/environments.md: installed as a user does it, and trained by one command.

Third-party packages and tir_alp itself come from the virtual environment that runs the tests.
"""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(*command, **more):
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=280, **more
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


LENT = [str(ROOT), *(path for path in sys.path if path.endswith("site-packages"))]
SMALL = ("--steps", "1", "--rollout.groups_per_step", "2", "--rollout.group_size", "2")


def train(python, folder, env_id, *settings):
    """Make one step in a folder; return the rows of its metrics."""
    said = run(
        *(python, "-m", "tir_alp.train", "--name", "example", "--env.id", env_id),
        *("--data.source", "env", "--eval.num_tasks", "2", *SMALL, *settings),
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(LENT)},
    )
    assert "step 1: accuracy" in said
    recorded = folder / "runs/example/trajectories/step_000001.jsonl"
    assert json.loads(recorded.read_text().splitlines()[0])["task_id"].startswith("env/train/0/")
    return [json.loads(each) for each in (folder / "runs/example/metrics.jsonl").open()]


def test_a_third_party_environment_is_installed_and_trained(tmp_path):
    wheels, venv = tmp_path / "wheels", tmp_path / "venv"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    source = tmp_path / "source"  # setuptools writes into the source folder
    run("cp", "-r", ROOT / "docs/examples/letter_count", source)
    how = ("--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", wheels)
    run(*pip, "wheel", *how, source)
    run(sys.executable, "-m", "venv", "--without-pip", venv)
    (wheel,) = wheels.iterdir()
    run(*pip, "--python", venv / "bin/python", "install", "--no-deps", "--quiet", wheel)
    assert sysconfig.get_path("purelib") in LENT
    kwargs = '{"instruction": "", "sandbox": {"preload": []}, "max_turns": 2}'
    python = venv / "bin/python"
    rows = train(python, tmp_path, "letter_count:LetterCount-v0", "--env.kwargs", kwargs)
    assert rows[1]["outcome/infra_error"] == 0 and "reward/answer" in rows[1]


def test_an_environment_in_one_file_is_trained_from_its_folder(tmp_path):
    run("cp", ROOT / "docs/examples/my_env.py", tmp_path)
    rows = train(sys.executable, tmp_path, "my_env:Mine-v0")
    assert rows[1]["outcome/infra_error"] == 0 and "reward/answer" in rows[1]
