"""Ctrl-C with rollouts ahead of the weights, and going on: no task is lost, none is repeated."""

import asyncio
import json
import os
import signal

import pytest
import torch

from tests.runs import assert_honest
from tir_alp.config import load_config, read_toml
from tir_alp.models.tiny import TRAIN_CONFIG
from tir_alp.records.trajectories import state_from_record, state_to_record
from tir_alp.run import supervise
from tir_alp.run.interrupt import Interrupted
from tir_alp.run.supervise import train_from
from tir_alp.train import train
from tir_alp.training import checkpoint

WORDS = (
    *("--name", "ahead", "--rollout.groups_per_step", "2", "--rollout.group_size", "2"),
    *("--rollout.max_staleness", "2", "--rollout.on_update", "keep", "--rollout.max_refills", "1"),
    *("--eval.num_tasks", "1", "--checkpoint.every", "0"),
)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config(steps):
    return load_config([*WORDS, "--steps", str(steps)], read_toml(TRAIN_CONFIG))


def rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_ctrl_c_and_resume_lose_no_task_and_repeat_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(supervise, "draw", lambda run: None)  # pictures take longer than the runs
    path = tmp_path / "runs" / "ahead"

    async def interrupted() -> None:
        training = asyncio.create_task(train_from(config(1000), None, train))
        while not (path / "trajectories" / "step_000002.jsonl").exists():
            assert not training.done(), training.exception()
            await asyncio.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Interrupted):
            await training

    asyncio.run(interrupted())
    saved, position, _ = checkpoint.newest(path / "checkpoints")
    before = state_from_record(checkpoint.load_rollouts(saved)["queue"])
    assert position.step >= 2 and len(before.pending) >= 4

    steps = position.step + 1
    asyncio.run(train_from(config(steps), path, train))
    last = path / "checkpoints" / f"step_{steps}"
    after = state_from_record(checkpoint.load_rollouts(last)["queue"])
    files = sorted((path / "trajectories").iterdir())
    steps_of = [{row["group_id"] for row in rows(file)} for file in files]
    trained = [group_id for each in steps_of for group_id in each]
    told = [row for file in sorted((path / "ledger").iterdir()) for row in rows(file)]
    fates = [row for row in told if row["kind"] == "group" and row["fate"] != "trained"]
    dropped = [row["group_id"] for row in fates]
    assert len(trained) == 2 * steps
    assert sorted([*trained, *dropped, *after.pending]) == list(range(after.next_group))
    assert {*before.pending} <= {*trained, *dropped, *after.pending}
    recorded = [row for file in files for row in rows(file)]
    for group in json.loads(json.dumps(state_to_record(before)))["finished"]:
        again = [row for row in recorded if row["group_id"] == group["group_id"]]
        assert not again or again == group["trajectories"]  # what was sampled stays
    assert_honest(path)
