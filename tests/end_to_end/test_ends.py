"""How a run can end before its last step, and what is left then."""

import asyncio
import json
import os
import subprocess
import sys
import time

import pytest

from tests.runs import assert_honest
from tir_alp.doctor.start import Doctor
from tir_alp.engines.base import EngineFailed
from tir_alp.models.tiny import TRAIN_CONFIG
from tir_alp.rollouts.queue import RolloutsFailed
from tir_alp.run.command_line import load_config, read_toml
from tir_alp.run.local_placement import LocalPlacement
from tir_alp.run.open_run import open_run
from tir_alp.train import main, train
from tir_alp.training import checkpoint_folder

SMALL = (
    *("--name", "ends", "--eval.num_tasks", "2", "--eval.greedy", "false"),
    *("--rollout.groups_per_step", "2", "--rollout.group_size", "2"),
)


def train_until(broken, *words: str):
    """Train a run of six steps that `broken` disturbs; returns its folder and the exception."""
    config = load_config([*SMALL, "--steps", "6", *words], read_toml(TRAIN_CONFIG))

    async def run():
        async with open_run(config, LocalPlacement(config), Doctor()) as opened:
            broken(opened)
            with pytest.raises((EngineFailed, RolloutsFailed)) as caught:
                await train(opened)
            return opened.folder.path, caught.value

    return asyncio.run(run())


def test_an_engine_that_fails_at_new_weights_leaves_a_checkpoint_of_the_step(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)

    def broken(run):
        load = run.engine.load_weights

        async def load_weights(source, version):
            if version == 3:
                raise EngineFailed("the server is gone")
            await load(source, version)

        run.engine.load_weights = load_weights

    path, _ = train_until(broken)
    assert checkpoint_folder.newest(path / "checkpoints")[1].step == 3
    assert main(["--resume", str(path), "--steps", "4"]) == 0
    assert_honest(path)


def test_rollouts_that_fail_leave_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def broken(run):
        take, taken = run.rollouts.take, 0

        async def counted():
            nonlocal taken
            taken += 1
            if taken == 3:
                raise RolloutsFailed("the sandbox is down")
            return await take()

        run.rollouts.take = counted

    path, _ = train_until(broken)
    assert checkpoint_folder.newest(path / "checkpoints")[1].step == 2


def test_a_prompt_that_is_too_long_is_left_out_by_name_and_the_run_goes_on(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"What is {n}+1?", "answer": str(n + 1)} for n in range(400)]
    for index in range(0, 400, 3):  # not among the first that are measured, whatever the order
        rows[index]["question"] += " please" * (60 if index >= 390 else 0)
    (tmp_path / "tasks.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    words = ["--data.source", "jsonl", "--data.path", "tasks.jsonl", "--rollout.group_size", "2"]
    words += ["--steps", "40", "--rollout.groups_per_step", "8", "--rollout.max_turn_tokens", "8"]
    monkeypatch.setattr("tir_alp.doctor.start._NUM_CHECKED", 1)
    monkeypatch.setattr("tir_alp.run.supervise.draw", lambda run, draw_report: None)
    code = main(["--name", "long", "--eval.num_tasks", "1", "--eval.greedy", "false", *words])
    assert code == 0, capsys.readouterr()
    named = (tmp_path / "runs/long/left_out.txt").read_text()
    assert "rollout.max_context_tokens = 256" in named


def test_a_running_run_cannot_be_resumed_and_loses_nothing(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "tir_alp.train", *SMALL, "--steps", "1000"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL
    ) as first:
        metrics = tmp_path / "runs/ends/metrics.jsonl"
        deadline = time.monotonic() + 120
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        second = subprocess.run(
            [sys.executable, "-m", "tir_alp.train", "--resume", "runs/ends"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert second.returncode == 2
        assert f"is being written by process {first.pid}" in second.stderr
        first.terminate()
        assert first.wait(60) == 130
    assert_honest(tmp_path / "runs/ends")


def test_no_steps_is_an_evaluation_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*SMALL, "--steps", "0"]) == 0
    printed = capsys.readouterr().out
    assert "nothing was trained" in printed and printed.count("accuracy") == 1
    rows = (tmp_path / "runs/ends/metrics.jsonl").read_text().splitlines()
    assert len(rows) == 1 and "eval/accuracy" in rows[0]


@pytest.mark.parametrize("staleness", [0, 2])
def test_no_group_is_begun_that_no_step_would_take(tmp_path, monkeypatch, staleness):
    monkeypatch.chdir(tmp_path)
    words = ["--steps", "4", "--rollout.max_staleness", str(staleness)]
    config = load_config([*SMALL, *words], read_toml(TRAIN_CONFIG))

    async def run():
        async with open_run(config, LocalPlacement(config), Doctor()) as opened:
            await train(opened)
            return opened.rollouts.state

    state = asyncio.run(run())
    assert (state.next_group, state.pending) == (4 * 2, ())
