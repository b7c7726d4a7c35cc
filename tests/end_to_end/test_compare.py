"""One command trains methods on stale, mismatched rollouts and prints one table."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import assert_honest

METHODS = ("grpo", "gspo", "bypass_sequence", "alp_token")
SMALL = (
    *("--steps", "2", "--rollout.groups_per_step", "2", "--rollout.group_size", "2"),
    *("--eval.num_tasks", "2", "--rollout.max_staleness", "1"),
)


def compare(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tir_alp.studies.compare", *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        timeout=800,
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_each_method_is_trained_once_and_is_in_the_table(tmp_path: Path):
    result = compare(tmp_path, "--seeds", "1", "--algorithms", *METHODS, "--", *SMALL)
    assert result.returncode == 0, result.stdout + result.stderr
    table = result.stdout.partition("method")[2]
    assert [name for name in METHODS if name not in table] == []
    runs = tmp_path / "runs" / "compare"
    assert (runs / "report" / "report.html").is_file()
    for run in runs.glob("*-seed0"):
        assert_honest(run)
    metrics = runs / "gspo-seed0" / "metrics.jsonl"
    written = metrics.stat().st_mtime_ns

    again = compare(tmp_path, "--seeds", "1", "--algorithms", "gspo", "alp_token", "--", *SMALL)
    assert again.returncode == 0, again.stdout + again.stderr
    assert metrics.stat().st_mtime_ns == written  # it had completed, and is kept


def test_a_run_that_fails_is_reported_with_its_output(tmp_path: Path):
    unknown = ("--env.id", "no_such_module:Mine-v0")
    result = compare(tmp_path, "--algorithms", "grpo", "--seeds", "1", "--", *unknown)
    assert result.returncode == 1
    assert "compare/grpo-seed0 failed with status 2" in result.stderr
    assert "no_such_module" in result.stderr
