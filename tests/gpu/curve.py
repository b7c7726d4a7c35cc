"""A short run of reinforcement learning: the tiny model learns to call the Python tool.

It is the default run, on the device. It is interrupted before its time is up, as Ctrl-C would, and
what it has logged by then counts.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.gpu.part import Task, perform

ROOT = Path(__file__).parents[2]
LEFT_S = 15.0  # for the checkpoint and the end of the run
LOGGED = ("rollout/reward", "rollout/tool_calls", "time/generate", "time/tool", "time/train")


def words_of(task: Task) -> list[str]:
    """Return the settings of the run: the default ones, smaller where it is reduced."""
    words = ["--name", "gpu", "--trackers", "[]", "--trainer.device", task.device.type]
    words += ["--steps", str(task.scale.curve_steps)]
    if task.is_reduced:
        words += ["--rollout.groups_per_step", "2", "--rollout.group_size", "2"]
        words += ["--eval.num_tasks", "2"]
    return words


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics that a run has logged."""
    file = folder / "runs/gpu/metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def work(task: Task) -> None:
    """Run, interrupt, and read what was logged."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        began = time.monotonic()
        run = subprocess.Popen([sys.executable, "-m", "tir_alp.train", *words_of(task)], cwd=folder)
        try:
            code = run.wait(max(1.0, task.deadline - began - LEFT_S))
        except subprocess.TimeoutExpired:
            run.send_signal(signal.SIGINT)
            try:
                code = run.wait(LEFT_S - 5)
            except subprocess.TimeoutExpired:
                run.kill()
                code = run.wait()
        rows = rows_of(folder)
        task.report.add("exit_code", code)
        task.report.add("seconds", time.monotonic() - began)
    steps = [row for row in rows if "rollout/reward" in row]
    task.report.add("steps", len(steps))
    task.report.add("curve", [{name: row[name] for name in LOGGED if name in row} for row in steps])
    task.report.add("accuracy", [r["eval/accuracy"] for r in rows if "eval/accuracy" in r])
    if not steps:
        raise ValueError(f"the run made no step and ended with exit code {code}; see the log")


if __name__ == "__main__":
    sys.exit(perform(work))
