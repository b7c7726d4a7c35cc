"""The benchmark against TRL: what it refuses, and that both sides do the work that it says.

TRL is not installed here: TIR_ALP_TRL_PYTHON names a Python that has it.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.benchmarks.against_trl.models import write_tiny
from tests.benchmarks.against_trl.worker import Case
from tests.benchmarks.bench_against_trl import ROOT, Side, at_best, compare, measure, row, started

TRL = os.environ.get("TIR_ALP_TRL_PYTHON")
SCRIPT = ROOT / "tests/benchmarks/bench_against_trl.py"
CASE = Case(
    model="tiny",
    folder="",
    num_completions=3,
    has_tool=False,
    precision="float32",
    share_prompts=True,
    num_groups=2,
    group_size=2,
    num_tokens=5,
    steps=2,
    threads=1,
)


def said(*words: str | Path) -> str:
    run = subprocess.run(
        [sys.executable, SCRIPT, *words], capture_output=True, text=True, check=False
    )
    assert run.returncode == 2, run.stderr
    return run.stderr


def test_without_the_python_of_trl_it_refuses_and_says_how_to_make_one(tmp_path: Path):
    text = said()
    assert "--trl-python is missing" in text and "pip install torch==2.13.0 'trl==1.16.*'" in text
    assert "is no program" in said("--trl-python", tmp_path / "python")
    assert "has no TRL (" in said("--trl-python", sys.executable)


def report(tokens: int = 5, prompt: int = 7) -> dict:
    return {
        "sampled": [[tokens] * 3] * 4,
        "prompts": [[prompt], [8]],
        "observed": [18] * 4,
        "seconds": 2.0,
        "rollout_s": 0.5,
        "update_s": 1.5,
    }


@pytest.mark.parametrize(
    ("theirs", "reason"),
    [
        (report(tokens=6), "step 3: the completions of theirs have the lengths"),
        (report(prompt=9), "step 3: the prompts differ"),
    ],
)
def test_other_work_is_no_comparison(theirs, reason):
    compare(3, {"ours": report(), "theirs": report()}, CASE)
    with pytest.raises(RuntimeError, match=reason):
        compare(3, {"ours": report(), "theirs": theirs}, CASE)


def test_a_row_has_the_ratio_of_medians_without_the_first_step():
    slow = Side([report(), report() | {"seconds": 6.0}, report() | {"seconds": 8.0}], 900.0)
    fast = Side([report() | {"seconds": 99.0}, report(), report()], 500.0)
    cells = row(replace(CASE, has_tool=True), "float32", {"ours": fast, "theirs": slow})
    assert cells[4:7] == ["7.00 (0.50 + 1.50)", "9", "900"]
    assert cells[7:] == ["2.00 (0.50 + 1.50)", "30", "500", "3.50"]
    assert "only after a tool call" in row(CASE, "float32", {"ours": fast})[-1]
    both = replace(CASE, has_tool=True)
    lines = at_best(
        [(both, {"ours": fast, "theirs": slow}), (both, {"ours": slow, "theirs": fast})]
    )
    assert lines == [
        "tiny, 3 completions, with tool: each at its best, TRL 2.00 s, ours 2.00 s: 1.00"
    ]


@pytest.mark.slow
def test_our_side_makes_the_steps_of_a_case(tmp_path: Path):
    case = replace(CASE, folder=str(write_tiny(tmp_path / "model")))
    with started(Path(sys.executable), "ours", tmp_path, 1) as ours:
        for _ in range(2):  # each case is a process of its own
            found = measure(case, {"ours": ours})["ours"]
            assert found.steps[1]["sampled"] == [[5, 5, 5]] * 4
            assert found.steps[0]["prompts"] != found.steps[1]["prompts"]
            assert min(found.median("rollout_s"), found.median("update_s")) > 0
            assert found.peak_mb > 100


@pytest.mark.slow
@pytest.mark.sandbox
@pytest.mark.skipif(TRL is None, reason="TIR_ALP_TRL_PYTHON names no Python with TRL")
def test_both_sides_do_the_same_work(tmp_path: Path):
    words = ["--models", "tiny", "--tokens", "4", "--steps", "1", "--group-size", "2"]
    run = subprocess.run(
        [sys.executable, SCRIPT, "--trl-python", str(TRL), *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    rows = [line for line in run.stdout.splitlines() if line.startswith("| qwen3")]
    assert len(rows) == 16  # each is printed when it is there, and again in the table
    assert run.stdout.count("TRL samples a further completion only after a tool call") == 4
