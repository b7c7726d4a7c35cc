"""In a run of the real trainer, no agent changes what another one samples."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("openai")

from tests.agents.misbehaving import WAYS
from tests.runs import assert_honest, train_with
from tir_alp.config import Config
from tir_alp.records.trajectories import from_record

ROOT = Path(__file__).parents[2]
GROUP = 2


def wild(seed, size, split):
    """A task for each way to behave."""
    asked = {"question": "What is 17*23+5?", "answer": "396"}
    names = WAYS if split == "train" else ["good"]
    return [{"task_id": name, "way": name, **asked} for name in names]


def calm(seed, size, split):
    """The same tasks in the same order, all of which are answered as they should be."""
    return [{**each, "way": "good"} for each in wild(seed, size, split)]


def trajectories(folder: Path, source: str) -> dict[str, list]:
    """Train one step; return the trajectories by task."""
    folder.mkdir()
    command = [sys.executable, str(ROOT / "tests/agents/misbehaving.py")]
    values = {
        "name": source,
        "steps": 1,
        "model": {"path": "tiny-able"},
        "env": {
            "id": "tir_alp.envs:Agent-v0",
            "kwargs": {"command": command, "timeout_s": 400.0},
        },
        "data": {"source": f"{__name__}:{source}"},
        "rollout": {
            "groups_per_step": len(WAYS),
            "group_size": GROUP,
            "max_turn_tokens": 24,
            "max_context_tokens": 256,
        },
        "eval": {"num_tasks": 1, "greedy": False},
        "trackers": [],
    }
    run = train_with(folder, Config.model_validate(values))
    assert_honest(run)
    lines = (run / "trajectories/step_000001.jsonl").read_text().splitlines()
    found: dict[str, list] = {name: [] for name in WAYS}
    for line in lines:
        each = from_record(json.loads(line))
        found[each.task_id].append(each)
    return found


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_no_agent_harms_the_episodes_of_another(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    peace, war = (trajectories(tmp_path / name, name) for name in ("calm", "wild"))
    for name in WAYS:
        assert len(peace[name]) == len(war[name]) == GROUP, name
    for before, after in zip(peace["good"], war["good"], strict=True):
        assert after.token_ids == before.token_ids and after.reward == before.reward
        assert len(after.turns) == 2 and not after.branches
    ends = {
        name: {json.loads(each.turns[-1].info["report"])["end"] for each in war[name]}
        for name in WAYS
    }
    assert ends == {name: {"failed" if name == "killed" else "exited"} for name in WAYS}
