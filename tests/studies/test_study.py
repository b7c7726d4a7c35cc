"""A study: what its file must say, how rows are judged, and the whole machinery once, reduced."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tir_alp.studies.study.definition import read_study
from tir_alp.studies.study.perform import make_runs, missing
from tir_alp.studies.study.rows import (
    collapse,
    first_at_least,
    landscape_columns,
    moving_means,
    read_rows,
    write_rows,
)
from tir_alp.studies.study.summary import difference, estimate, markdown

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "docs/results").glob("*.toml"))
STUDY = """
question = "Does the machinery work?"
hypotheses = ["It does."]
analysis = "The rows are equal when they are made again."
base = "compare.toml"
baseline = "bypass"
seeds = 2

[common]
steps = 2
deterministic = true
metrics.clean_every = 1
rollout = { groups_per_step = 2, group_size = 2, max_staleness = 0, hold = false }
eval.num_tasks = 2
guards.on_trip = "stop"

[methods.bypass]
algorithm = "bypass_sequence"

[methods.own]
algorithm = "own_method:PRESET"

[settings.int8]
engine.precision = "int8"

[measures]
window = 2
take_off = 0.01
"""
METHOD = """
from tir_alp.algorithm import ALGORITHMS, Surrogate


def soft(ratios, logprobs, advantages, algorithm):
    return -advantages * 4 * (ratios - 1).sigmoid(), {}


SOFT = Surrogate(soft, lambda algorithm: "-4 A sigmoid(r_t - 1)")
PRESET = ALGORITHMS["bypass_token"].model_copy(update={"surrogate": "own_method:SOFT"})
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own_method.py").write_text(METHOD)
    (tmp_path / "small.toml").write_text(STUDY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_method", raising=False)
    return tmp_path / "small.toml"


def row(method: str, seed: int, level: float | None, **changes):
    base = {"setting": "int8", "method": method, "seed": seed, "level": level, "digest": "d"}
    base |= {"took_off": 3, "collapsed": None, "accuracy": 0.5, "widest_clean": 2.0}
    base |= {"max_kl_clean": 0.1, "clip_clean": 0.0, "curve": [[1, 0.1], [2, 0.2]]}
    return base | changes


def test_methods_of_a_seed_share_it_and_follow_one_another(file):
    study = read_study(file)
    assert [(each.seed, each.method) for each in study.runs] == [
        *((0, "bypass"), (0, "own"), (1, "bypass"), (1, "own"))
    ]
    first = study.runs[0]
    assert first.config.seed == 0 and first.config.engine.precision == "int8"  # type: ignore[union-attr]
    assert first.config.algorithm.name == "bypass_sequence"
    assert first.config.name == "small/int8/bypass-seed0"
    assert len({each.digest for each in study.runs}) == 4


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('hypotheses = ["It does."]', "hypotheses = []", "hypotheses"),
        ('baseline = "bypass"', 'baseline = "grpo"', "the baseline 'grpo' is not a method"),
        (
            'algorithm = "bypass_sequence"',
            'algorithm = "bypass_sq"',
            "int8, bypass: .*did you mean",
        ),
        ("steps = 2", "stepz = 2", "stepz: there is no such key; did you mean steps"),
        ('base = "compare.toml"', 'base = "none.toml"', "there is no file 'none.toml' beside"),
        ("take_off = 0.01", "", "take_off"),
    ],
)
def test_a_mistake_in_the_file_is_found_before_any_run(file, old, new, message):
    file.write_text(STUDY.replace(old, new))
    with pytest.raises(ValueError, match=message):
        read_study(file)


def test_an_unfinished_study_has_every_method_and_setting_for_some_seeds(file):
    file.write_text(STUDY.replace("[measures]", "[settings.exact]\n\n[measures]"))
    keys = [each.key for each in read_study(file).runs]
    assert keys[:4] == [
        *(("int8", "bypass", 0), ("int8", "own", 0)),
        *(("exact", "bypass", 0), ("exact", "own", 0)),
    ]
    assert {seed for _, _, seed in keys[4:]} == {1}


def test_rows_depend_on_the_number_of_threads(file):
    one = read_study(file).runs[0]
    file.write_text(STUDY.replace("seeds = 2", "seeds = 2\nthreads = 2"))
    two = read_study(file).runs[0]
    assert (one.threads, two.threads) == (1, 2) and one.digest != two.digest


def test_no_run_is_begun_after_the_time_is_over(file):
    study = read_study(file)
    assert list(make_runs(study, study.runs, jobs=2, minutes=0)) == []
    assert not Path("runs").exists()


def test_rows_of_other_settings_are_refused(file):
    study = read_study(file)
    rows = [row(each.method, each.seed, 0.5, digest=each.digest) for each in study.runs]
    assert missing(study, rows) == []
    assert [each.key for each in missing(study, rows[1:])] == [("int8", "bypass", 0)]
    with pytest.raises(ValueError, match="was made with other settings"):
        missing(study, [rows[0] | {"digest": "other"}])
    with pytest.raises(ValueError, match="which the study does not have"):
        missing(study, [rows[0] | {"method": "grpo"}])


def test_take_off_and_collapse():
    steps, means = [1, 2, 3, 4, 5], [0.0, 0.4, 0.8, 0.3, 0.9]
    assert first_at_least(steps, means, 0.4) == 2 and first_at_least(steps, means, 1.0) is None
    assert collapse(steps, means, 2, 0.5) == 4
    assert collapse(steps, means, 2, 0.3) is None
    assert collapse(steps, [0.5, 0.1, 0.4, 0.4, 0.4], 3, 0.5) is None  # it had not taken off
    assert collapse(steps, [0.5, 0.5, math.nan, 0.5, 0.5], 1, 0.5) == 3
    assert moving_means([1.0, 2.0, 6.0], 2) == [1.0, 1.5, 4.0]


def test_differences_are_by_seed_and_leave_out_what_is_missing():
    own = [row("own", seed, value) for seed, value in enumerate([0.5, 0.9, None])]
    base = [row("bypass", seed, value) for seed, value in enumerate([0.4, 0.8, 0.1])]
    found = difference(own, base, "level")
    assert found is not None and found.num_tasks == 2
    assert found.mean == pytest.approx(0.1) == found.low == found.high
    assert estimate([row("own", 0, None)], "level") is None


def test_the_table_says_how_it_was_decided(file):
    study = read_study(file)
    rows = [row("bypass", seed, 0.5 + seed / 10) for seed in range(2)]
    rows += [row("own", seed, 0.6 + seed / 10, collapsed=9) for seed in range(2)]
    text = markdown(study.config, rows)
    assert "Does the machinery work?" in text and "**Hypothesis 1.** It does." in text
    (own,) = [line for line in text.splitlines() if line.startswith("| own |")]
    assert "| 2 of 2 | 3 [3, 3] | 2 of 2 |" in own and "+0.100 [+0.100, +0.100]" in own


def test_the_landscape_of_the_last_policy_is_a_column_if_it_is_asked_for(file):
    measures = read_study(file).config.measures.model_copy(update={"landscape": True})
    report = {
        "sharpness": [{"trace": 3.0, "rms": 2.0}, {"trace": -1.0, "rms": 1.0}],
        "rounding": [{"precision": "int8", "mean": 1e-3}, {"precision": "bfloat16", "mean": 2e-4}],
    }
    assert landscape_columns(report) == {
        **{"sharpness": 11.0, "sharpness_by_layer": [12.0, -1.0]},
        **{"rounding_bfloat16": 2e-4, "rounding_int8": 1e-3},
    }
    assert math.isnan(landscape_columns(None)["sharpness"])
    config = read_study(file).config.model_copy(update={"measures": measures})
    own = [row("own", seed, 0.5, sharpness=seed, rounding_int8=1e-3) for seed in range(2)]
    text = markdown(config, own)
    assert (
        "moved by int8 weights" in text and "| 0.5 [0, 1] | 1.00e-03 [1.00e-03, 1.00e-03] |" in text
    )
    assert "moved by int8 weights" not in markdown(read_study(file).config, own)
    assert max(len(line) for line in text.splitlines() if not line.startswith("|")) <= 100


def test_rows_are_written_in_order(tmp_path):
    write_rows(tmp_path / "rows", [row("b", 1, 0.0), row("b", 0, 0.0), row("a", 3, 0.0)])
    assert [(r["method"], r["seed"]) for r in read_rows(tmp_path / "rows")] == [
        *(("a", 3), ("b", 0), ("b", 1))
    ]


def command(*words: str, code: int = 0) -> str:
    result = subprocess.run(
        [sys.executable, "-m", "tir_alp", "study", *words, "--jobs", "2"],
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.getcwd()}"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize("file", FILES, ids=lambda each: each.stem)
def test_a_study_of_ours_can_be_made_and_asks_what_its_rows_can_answer(file):
    study = read_study(file)
    cells = len(study.config.methods) * len(study.config.settings)
    assert len(study.runs) == cells * study.config.seeds and study.config.seeds >= 5
    assert len({each.digest for each in study.runs}) == len(study.runs)
    for each in study.runs:
        assert each.config.deterministic and each.config.metrics.clean_every > 0
    assert len(FILES) >= 5


@pytest.mark.slow
def test_a_study_is_made_resumed_and_repeated_bit_for_bit(file):
    folder = file.with_suffix("")
    printed = command(str(file))
    assert "0 of 4 runs have a row" in printed
    rows = (folder / "rows.jsonl").read_text()
    assert len(rows.splitlines()) == 4 and len(rows) < 8000
    found = {(r["method"], r["seed"]): r for r in map(json.loads, rows.splitlines())}
    assert all(r["steps"] == 2 and r["widest_clean"] is not None for r in found.values())
    assert not list(Path("runs/small/int8").iterdir())
    assert {each.name for each in folder.iterdir()} == {
        *("rows.jsonl", "table.md", "curves.png", "differences.png")
    }

    kept = [line for line in rows.splitlines() if '"own", "seed": 1' not in line]
    (folder / "rows.jsonl").write_text("\n".join(kept) + "\n")  # as if it had been interrupted
    assert "3 of 4 runs have a row" in command(str(file))
    assert (folder / "rows.jsonl").read_text() == rows
    assert command(str(file), "--repeat", "int8", "bypass").count("equal") == 2
    (folder / "rows.jsonl").write_text(rows.replace('"level": ', '"level": 1'))
    assert "DIFFERENT" in command(str(file), "--repeat", "int8", "bypass", code=1)
