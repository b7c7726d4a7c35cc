"""Adapters in a whole run: the engine gets nothing else, and a resumed run goes on with them."""

import asyncio
import json
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file

from tests.runs import assert_honest
from tir_alp.models.tiny import ABLE, TRAIN_CONFIG
from tir_alp.run import supervise
from tir_alp.run.command_line import load_config, read_toml
from tir_alp.run.supervise import train_from
from tir_alp.train import services
from tir_alp.training.policy import load_policy

WORDS = (
    *(
        "--name",
        "adapters",
        "--model.path",
        "tiny-able",
        "--deterministic",
        "true",
        "--rollout.max_staleness",
        "0",
    ),
    *("--rollout.groups_per_step", "4", "--rollout.group_size", "4"),
    *("--trainer.lora.rank", "4", "--trainer.lr", "1e-2", "--checkpoint.every", "1"),
    *("--eval.num_tasks", "1", "--metrics.clean_every", "1"),
)


def config(steps: int):
    return load_config([*WORDS, "--steps", str(steps)], read_toml(TRAIN_CONFIG))


def run(folder: Path, *stops: int) -> Path:
    """Train up to each of some steps, resuming in between; returns the run's folder."""
    path = folder / "runs" / "adapters"
    for index, stop in enumerate(stops):
        asyncio.run(train_from(config(stop), path if index else None, services()))
    return path


def rows(path: Path) -> list[dict[str, float]]:
    """What the steps of a run measured, without times and the counters of an engine's life."""
    records = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    left_out = ("time/", "tokens/per", "engine/tokens")
    return [
        {name: value for name, value in each.items() if not name.startswith(left_out)}
        for each in records
        if "loss/value" in each
    ]


def test_a_run_with_adapters_resumes_exactly_and_exports_both_forms(tmp_path, monkeypatch):
    monkeypatch.setattr(supervise, "draw", lambda run, draw_report: None)
    torch.set_num_threads(1)
    paths = []
    for name, stops in (("whole", (2,)), ("pieces", (1, 2))):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        paths.append(run(tmp_path / name, *stops))
    whole, pieces = paths
    assert rows(whole) == rows(pieces)
    assert [each["rollout/reward"] for each in rows(whole)] != [0, 0]  # else nothing is learned
    assert rows(whole)[1]["engine/tensors_compared"] == 2 * 21  # two factors of 21 layers
    assert rows(whole)[1]["mismatch/probe_max"] < 1e-4  # the engine has the trainer's policy
    assert_honest(whole)
    saved = whole / "checkpoints" / "step_2"
    merged = load_policy(str(saved))
    adapted = peft.PeftModel.from_pretrained(load_policy(str(ABLE)), str(saved / "adapters"))
    torch.testing.assert_close(adapted.merge_and_unload().state_dict(), merged.state_dict())
    moved = load_file(saved / "adapters" / "adapter_model.safetensors")
    assert all(each.any() for name, each in moved.items() if "lora_B" in name)
