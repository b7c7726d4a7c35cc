"""The tiny agent trained through a real SGLang server, with the shipped config but fewer steps.

Added are two features for shared GPUs and several servers: memory that is released to the trainer,
and SGLang's own router.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engines.harness import needs_sglang
from tests.runs import assert_honest

CONFIG = Path(__file__).parents[2] / "configs" / "tiny_sglang.toml"


@needs_sglang
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_tiny_agent_learns_from_an_sglang_server(tmp_path):
    command = [sys.executable, "-m", "tir_alp.train", "--config", str(CONFIG), "--name", "served"]
    words = ["--steps", "10", "--eval.num_tasks", "32", "--eval.greedy", "false"]
    words += ["--engine.release_memory", "true", "--engine.router", "local"]
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    subprocess.run([*command, *words], cwd=tmp_path, env=environment, check=True, timeout=1400)
    run = tmp_path / "runs" / "served"
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in metrics if "rollout/reward" in record]
    rewards = [record["rollout/reward"] for record in steps]
    assert sum(rewards[-3:]) > 1.2 * sum(rewards[:3])
    for record in steps:  # each step is sampled with the newest weights
        assert record["staleness/max"] == 0
        assert record["rollout/failed"] == 0
        assert record["engine/tensors_compared"] == 4  # of each sync, bit for bit
        assert record["engine/probe_difference"] < 1e-5
    assert max(record["mismatch/probe_max"] for record in steps) < 1e-4  # float32 is exact
    assert max(record["rollout/turns"] for record in steps) > 1
    assert_honest(run)
