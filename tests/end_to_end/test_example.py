"""The example of docs/environments.md, installed as a user would, and trained by one command.

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
    borrowed = [str(ROOT), *(path for path in sys.path if path.endswith("site-packages"))]
    assert sysconfig.get_path("purelib") in borrowed
    settings = ("--env.kwargs", '{"instruction": "", "sandbox": {"preload": []}, "max_turns": 2}')
    printed = run(
        *(venv / "bin/python", "-m", "tir_alp.train", "--name", "example", "--steps", "1"),
        *("--env.id", "letter_count:LetterCount-v0", "--data.source", "env", *settings),
        *("--rollout.groups_per_step", "2", "--rollout.group_size", "2", "--eval.num_tasks", "2"),
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(borrowed)},
    )
    assert "step 1: accuracy" in printed
    recorded = tmp_path / "runs/example/trajectories/step_000001.jsonl"
    assert json.loads(recorded.read_text().splitlines()[0])["task_id"].startswith("env/train/0/")
    metrics = [json.loads(each) for each in (tmp_path / "runs/example/metrics.jsonl").open()]
    assert metrics[1]["outcome/infra_error"] == 0 and "reward/answer" in metrics[1]
