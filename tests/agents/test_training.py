"""Unchanged agents train the tiny model, and the audit accounts for every token."""

import json

import pytest

from tests.runs import assert_honest, train_with
from tir_alp.config import Config

pytest.importorskip("openai")


def config(steps=1, **changed) -> Config:
    values = {
        "name": "agents",
        "steps": steps,
        "model": {"path": "tiny-able"},
        "env": {
            "id": "tir_alp.envs:Agent-v0",
            "kwargs": {"function": "tests.agents.openai_loop:solve", "timeout_s": 60.0},
        },
        "agents": {"calls": "fenced"},
        "rollout": {
            "groups_per_step": 2,
            "group_size": 4,
            "max_turn_tokens": 64,
            "max_context_tokens": 256,
        },
        "eval": {"num_tasks": 2, "greedy": False},
        "trackers": [],
    }
    return Config.model_validate(values | changed)


def trajectories(run):
    lines = (run / "trajectories/step_000001.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_an_openai_loop_trains_and_is_audited(tmp_path):
    run = train_with(tmp_path, config())
    records = trajectories(run)
    assert len(records) == 8
    assert any(len(each["turns"]) > 1 for each in records)
    assert any(turn["info"]["tool_calls"] for each in records for turn in each["turns"])
    assert_honest(run)
