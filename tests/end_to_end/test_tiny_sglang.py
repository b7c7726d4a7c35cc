"""The tiny agent trained through a real SGLang server: the config as it is shipped, but shorter.

And with what a shared GPU and several servers would have besides: memory that is lent to the
trainer, and SGLang's own router.
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
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "rollout/reward" in row]
    rewards = [row["rollout/reward"] for row in steps]
    assert sum(rewards[-3:]) > 1.2 * sum(rewards[:3])
    for row in steps:  # each step is sampled by the newest weights
        assert row["staleness/max"] == 0
        assert row["rollout/failed"] == 0
        assert row["engine/tensors_compared"] == 4  # of each sync, to the last bit
        assert row["engine/probe_difference"] < 1e-5
    assert max(row["mismatch/probe_max"] for row in steps) < 1e-4  # float32 is exact
    assert max(row["rollout/turns"] for row in steps) > 1
    assert_honest(run)
