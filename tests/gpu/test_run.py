"""The script for a GPU runs through on this machine, and writes what it promises."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.gpu.__main__ import PARTS, Plan, run_part
from tests.gpu.marked import ROOT, marked_files
from tests.gpu.page import page

KEYS = {
    "marked": {"files", "ends", "counts"},
    "training": {"product_flops_per_s", "peak", "step", "random-1.5b", "smollm2-135m"},
    "decode": {"copied_bytes_per_s", "random-1.5b", "smollm2-135m"},
    "noise": {"copied_bytes_per_s", "random-1.5b", "smollm2-135m"},
    "collectives": {"backend", "nccl", "ranks", "sum", "losses", "mean_difference_of_weights"},
    "curve": {"exit_code", "seconds", "steps", "curve", "accuracy"},
}
VARIANTS = {f"{m}, {s}" for m in ("alp", "bypass") for s in ("shared", "not shared")}
PAIRS = {"alp_over_bypass, shared", "alp_over_bypass, not shared", "shared_over_not_shared"}


@pytest.mark.slow
@pytest.mark.sandbox
@pytest.mark.timeout(1500)
def test_every_part_is_ok(tmp_path: Path):
    env = os.environ | {"OUT": str(tmp_path), "PYTHON": sys.executable}
    script = ROOT / "tests/gpu/run.sh"
    run = subprocess.run(
        ["bash", script, "--seconds", "1400"],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    results = json.loads((tmp_path / "results.json").read_text())
    ends = {name: (part["status"], part["reason"]) for name, part in results["parts"].items()}
    assert ends == dict.fromkeys(PARTS, ("ok", None)), (tmp_path / "log.txt").read_text()[-4000:]
    assert run.returncode == 0
    figures = {name: part["figures"] for name, part in results["parts"].items()}
    for name, keys in KEYS.items():
        assert keys <= figures[name].keys(), name
    for model in ("random-1.5b", "smollm2-135m"):
        found = figures["training"][model]
        assert found["variants"].keys() == VARIANTS and found.keys() >= PAIRS
        assert all(0 < row["mfu"] < 1 for row in found["variants"].values())
        assert figures["noise"][model]["share_of_step"] > 0
        assert all(row["tokens_per_s"] > 0 for row in figures["decode"][model].values())
    assert figures["curve"]["steps"] >= 1 and "rollout/reward" in figures["curve"]["curve"][0]
    written = (tmp_path / "results.md").read_text()
    assert "tokens/s" in written and ("no GPU" in written) == results["is_reduced"]


def plan(folder: Path, seconds: float) -> Plan:
    return Plan(folder, True, None, 480.0, time.monotonic() + seconds)


def test_a_part_without_time_is_not_run_and_the_page_says_so(tmp_path: Path):
    found = run_part("training", plan(tmp_path, 5), tmp_path / "log.txt")
    assert (found["status"], found["reason"]) == ("not run", "no time was left")
    results = {"environment": {}, "is_reduced": True, "parts": {"training": found}}
    written = page(results)
    assert "| training | not run | 0 | no time was left |" in written
    assert "Nothing was measured." in written


@pytest.mark.slow
def test_a_part_that_takes_too_long_is_stopped(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(PARTS, "curve", 10.5)
    found = run_part("curve", plan(tmp_path, 60), tmp_path / "log.txt")
    assert found["status"] in ("timed out", "failed") and found["seconds"] < 30


def test_all_files_with_marked_tests_are_run():
    names = {each.relative_to(ROOT).as_posix() for each in marked_files()}
    assert names >= {"tests/training/test_device.py", "tests/training/test_ranks.py"}
    assert "tests/gpu/test_run.py" not in names


def test_the_wheels_have_versions():
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    named = (ROOT / "tests/gpu/wheels.txt").read_text().splitlines()
    names = {each.lower().replace("_", "-") for each in named if not each.startswith("#")}
    assert names and names <= pinned
