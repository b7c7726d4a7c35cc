"""Ctrl-C and resume with rollouts ahead of the weights: no task is lost or repeated."""

import asyncio
import json
import os
import signal

import pytest
import torch

from tests.runs import assert_honest
from tir_alp.models.tiny import TRAIN_CONFIG
from tir_alp.records.trajectories import from_record, state_from_record, state_to_record
from tir_alp.run import supervise
from tir_alp.run.command_line import load_config, read_toml
from tir_alp.run.interrupt import Interrupted
from tir_alp.run.supervise import train_from
from tir_alp.train import services
from tir_alp.training import checkpoint_folder

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


def records(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_ctrl_c_and_resume_lose_and_repeat_no_task(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Drawing takes longer than the runs.
    monkeypatch.setattr(supervise, "draw", lambda run, draw_report: None)
    path = tmp_path / "runs" / "ahead"

    async def interrupted() -> None:
        training = asyncio.create_task(train_from(config(1000), None, services()))
        while not (path / "trajectories" / "step_000002.jsonl").exists():
            assert not training.done(), training.exception()
            await asyncio.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Interrupted):
            await training

    asyncio.run(interrupted())
    saved, position, _ = checkpoint_folder.newest(path / "checkpoints")
    before = state_from_record(checkpoint_folder.load_rollouts(saved)["queue"])
    assert position.step >= 2 and len(before.pending) >= 4

    steps = position.step + 1
    asyncio.run(train_from(config(steps), path, services()))
    last = path / "checkpoints" / f"step_{steps}"
    after = state_from_record(checkpoint_folder.load_rollouts(last)["queue"])
    files = sorted((path / "trajectories").iterdir())
    of_steps = [{each["group_id"] for each in records(file)} for file in files]
    trained = [group_id for group_ids in of_steps for group_id in group_ids]
    ledger = [each for file in sorted((path / "ledger").iterdir()) for each in records(file)]
    groups = [each for each in ledger if each["kind"] == "group"]
    dropped = [each["group_id"] for each in groups if each["fate"] != "trained"]
    assert len(trained) == 2 * steps
    assert sorted([*trained, *dropped, *after.pending]) == list(range(after.next_group))
    assert {*before.pending} <= {*trained, *dropped, *after.pending}
    recorded = [each for file in files for each in records(file)]
    for group in json.loads(json.dumps(state_to_record(before)))["finished"]:
        again = [each for each in recorded if each["group_id"] == group["group_id"]]
        kept = [from_record(each) for each in group["trajectories"]]
        assert not again or [from_record(each) for each in again] == kept  # as it was sampled
    assert_honest(path)
