"""Where a run comes from, how long it took and what it used, as its folder says."""

import json

import pytest

from tests.report.test_report import METRICS, make_run
from tir_alp.records.provenance import PROVENANCE, note_end
from tir_alp.report import write_run_report
from tir_alp.report.__main__ import main
from tir_alp.report.facts import provenance_of
from tir_alp.report.read import read_run


def change(path, **values):
    """Change the provenance of a run."""
    file = path / PROVENANCE
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return path


def facts(path, price=None):
    return dict(provenance_of(read_run(path), price))


def test_a_run_says_where_it_comes_from(tmp_path):
    path = make_run(tmp_path / "run")
    saved, found = json.loads((path / PROVENANCE).read_text()), facts(path)
    assert found["command"] == saved["command"]
    assert saved["versions"]["torch"] in found["versions"]
    assert f"{saved['hardware']['cores']} cores" in found["hardware"]
    assert found["began"] == saved["times"][0]["started"]
    assert found["ended"] == saved["times"][0]["ended"]
    assert float(found["peak memory"].split()[0]) == pytest.approx(
        saved["times"][0]["peak_memory_gb"], rel=1e-3
    )
    page, text = write_run_report(path).read_text(), (path / "report.md").read_text()
    for each in (found["began"], found["peak memory"]):
        assert each in page and each in text


TIMES = [
    {"started": "2026-01-01T10:00:00+00:00", "ended": "2026-01-01T11:00:00+00:00", "cpu_s": 3600},
    {
        **{"started": "2026-01-02T10:00:00+00:00", "ended": "2026-01-02T10:30:00+00:00"},
        **{"cpu_s": 1800.0, "peak_memory_gb": 3.25, "peak_gpu_memory_gb": [10.5, 12.5]},
    },
]


def test_several_starts_are_added_up(tmp_path):
    path = make_run(tmp_path / "run")
    first = json.loads((path / PROVENANCE).read_text())
    later = [{"command": "train --resume", "commit": "abc"}]
    hardware = first["hardware"] | {"gpus": ["H200", "H200"]}
    change(path, times=TIMES, resumed=later, commit="123", hardware=hardware)
    found = facts(path, price=2.0)
    assert found["duration"] == "1 h 30 min, 30 min 0 s per step"
    assert found["ended"].endswith("; 2 starts") and found["resumed by"] == "train --resume"
    assert found["commit"] == "123, then abc"
    assert "2 x H200" in found["hardware"]
    assert found["peak memory"] == "3.25 GB of the process"
    assert found["peak GPU memory"] == "12.5 GB of one GPU, by PyTorch"
    assert found["used"].startswith("1.5 core hours; 3 GPU hours (2 GPUs")
    assert "300 tokens written by the policy" in found["used"]
    assert found["cost"] == "3.00, at 2 per hour of the machine"


def test_a_run_that_is_going_on_or_was_killed(tmp_path):
    path = change(
        make_run(tmp_path / "run"), times=[{"started": TIMES[0]["started"], "ended": None}]
    )
    found = facts(path)
    assert "it is going on, or it was killed" in found["ended"]
    assert "until its last metrics" in found["duration"]


@pytest.mark.parametrize(
    "odd",
    [
        {"times": None, "hardware": None, "versions": [], "resumed": {}},
        {"times": [3, {"started": 5, "ended": "soon"}], "hardware": {"gpus": 7}, "commit": [1]},
        {"times": [{"started": "2026-01-01T10:00:00", "peak_memory_gb": "much"}]},
        {"command": "<script>\u202e" * 3000, "hardware": {"gpus": ["<b>"] * 1000}},
    ],
)
def test_a_provenance_of_another_kind_is_no_obstacle(tmp_path, odd):
    path = change(make_run(tmp_path / "run", [(1, METRICS)]), **odd)
    page = write_run_report(path).read_text()
    assert "Provenance" in page and "\u202e" not in page and "<script>\u27e8" not in page


def test_a_run_without_provenance(tmp_path):
    path = make_run(tmp_path / "run")
    (path / PROVENANCE).unlink()
    assert facts(path) == {"provenance": "the run recorded none"}
    assert "the run recorded none" in write_run_report(path).read_text()


def test_what_a_process_used_is_recorded_at_its_end(tmp_path):
    path = make_run(tmp_path / "run")
    (times,) = json.loads((path / PROVENANCE).read_text())["times"]
    assert times["cpu_s"] >= 0 and times["peak_memory_gb"] > 0.01
    sum(number**2 for number in range(3_000_000))
    note_end(path)
    (later,) = json.loads((path / PROVENANCE).read_text())["times"]
    assert later["cpu_s"] > times["cpu_s"] and later["started"] == times["started"]
    assert later["peak_memory_gb"] >= times["peak_memory_gb"]


def test_the_price_is_given_on_the_command_line(tmp_path, capsys):
    path = change(make_run(tmp_path / "run"), times=TIMES)
    assert main([str(path), "--price-per-hour", "4"]) == 0
    assert "6.00, at 4 per hour of the machine" in (path / "report.html").read_text()
    capsys.readouterr()
