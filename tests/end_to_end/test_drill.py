"""A run on a real Ray cluster under faults: nothing is lost, repeated or left over."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("ray")


@pytest.mark.slow
@pytest.mark.sandbox
@pytest.mark.timeout(1200)
def test_killed_and_frozen_actors_lose_and_repeat_nothing(tmp_path):
    """In its own process, because the drill checks everything that is left of it."""
    command = [sys.executable, "-m", "tir_alp.studies.drill", "--faults", "3", "--twin-steps", "6"]
    command += ["--folder", str(tmp_path), "--cluster.patience_s", "10"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1100)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout[done.stdout.index("{\n") : done.stdout.rindex("}") + 1])
    assert sum(report["faults"].values()) == 3 and report["trained"] > 0
    assert report["trained"] + report["dropped"] + report["pending"] == report["groups"]
    assert report["compared"] > 0
