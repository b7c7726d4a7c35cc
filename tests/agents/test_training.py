"""Unchanged agents train the tiny model, and the audit accounts for every token."""

import json
import sys
from pathlib import Path

import pytest

from tests.runs import assert_honest, train_with
from tir_alp.algorithm.presets import ALGORITHMS
from tir_alp.config import Config

pytest.importorskip("openai")
ROOT = Path(__file__).parents[2]


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


def agent(**kwargs):
    return {"id": "tir_alp.envs:Agent-v0", "kwargs": {"timeout_s": 60.0} | kwargs}


def test_a_command_with_anthropics_client_trains_and_is_audited(tmp_path, monkeypatch):
    pytest.importorskip("anthropic")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = [sys.executable, str(ROOT / "tests/agents/anthropic_script.py")]
    rollout = config().rollout.model_dump() | {"groups_per_step": 1, "group_size": 2}
    run = train_with(tmp_path, config(env=agent(command=command), rollout=rollout))
    records = trajectories(run)
    assert len(records) == 2 and not any("error" in each for each in records)
    for each in records:
        assert json.loads(each["turns"][-1]["info"]["report"])["end"] == "exited"
    assert_honest(run)


def test_all_traces_of_an_agent_train_and_are_audited(tmp_path):
    env = agent(function="tests.agents.openai_loop:solve_twice")
    run = train_with(tmp_path, config(env=env, agents={"calls": "fenced", "train_on": "all"}))
    records = trajectories(run)
    assert all(len(each["branches"]) == 1 for each in records)
    ledger = (run / "ledger/step_000001.jsonl").read_text().splitlines()
    (update,) = [each for each in map(json.loads, ledger) if each["kind"] == "update"]
    assert len(update["sequences"]) == 16  # two traces of each of eight episodes
    assert_honest(run)


@pytest.mark.parametrize(
    "changed, reason",
    [
        ({"deterministic": True}, "deterministic needs an environment"),
        ({"algorithm": ALGORITHMS["gigpo"]}, "algorithm.advantage = 'gigpo' compares turns"),
        ({"cluster": {"address": "local"}}, "loopback"),
        ({"env": agent(function="tests.none:solve")}, "env.kwargs.function"),
        ({"env": agent()}, "one of command and function"),
    ],
)
def test_what_cannot_be_trained_is_refused_at_the_start(tmp_path, changed, reason):
    with pytest.raises(ValueError, match=reason):
        train_with(tmp_path, config(**changed))
