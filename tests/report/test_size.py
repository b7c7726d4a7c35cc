"""A page stays small, however long a run is and however much was written in it."""

import json
import math

from tests.inspector.made import rewrite, trajectory, write_run
from tests.report.test_layout import EVERYTHING
from tests.report.test_report import make_run
from tir_alp.records.folder import RunFolder
from tir_alp.report import write_run_report
from tir_alp.report.curves import curves_of_run, kept_steps
from tir_alp.report.read import Series, read_run

BOUND = 8 << 20
"""Bytes of a page of one run, as docs/report.md says."""
LONG = "long <b>text</b> \u202e " * 10_000


def test_a_page_is_bounded(tmp_path):
    path = write_run(tmp_path / "run", [[trajectory(0, ("q", "a", "b", "c"), 0.0)]] * 3)
    names = {**EVERYTHING, **{f"mine/{number}{'x' * 400}": 1.0 for number in range(900)}}
    lines = []
    for step in range(1, 1001):
        values = {name: value * (1 + math.sin(step / 9)) for name, value in EVERYTHING.items()}
        lines.append(json.dumps({"step": step, **(names if step == 1 else {}), **values}))
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")

    def change(record):
        record["task_id"] = LONG
        for span in (record["prompt"], *(turn["completion"] for turn in record["turns"])):
            span["text"] = LONG

    for file in (path / "trajectories").iterdir():
        rewrite(file, change)
    events = [{"step": n % 1000, "kind": "roll_back", "reason": LONG[:2000]} for n in range(2000)]
    (path / "events.jsonl").write_text("".join(json.dumps(each) + "\n" for each in events))
    environment = {"step": 0, "tools": {"python": {"backend": LONG}}, "warnings": [LONG] * 3}
    (path / "environment.jsonl").write_text(json.dumps(environment) + "\n")
    (path / "advice.jsonl").write_text(json.dumps({"step": 1, "advice": LONG}) + "\n")
    (path / "objective.txt").write_text(LONG)
    config = json.loads((path / "config.json").read_text())
    config["model"]["system"] = LONG
    (path / "config.json").write_text(json.dumps(config | {LONG: LONG}))
    (path / "provenance.json").write_text(json.dumps({"command": LONG, "versions": {LONG: LONG}}))
    size = write_run_report(path).stat().st_size
    assert size < BOUND
    assert (path / "report.md").stat().st_size < BOUND / 2


def test_an_ordinary_page_takes_a_megabyte(tmp_path):
    path = make_run(tmp_path / "run", [(step, EVERYTHING) for step in range(1, 101)])
    assert 100_000 < write_run_report(path).stat().st_size < 3 << 20


def test_what_is_kept_of_a_long_run_has_its_extremes():
    values = [math.sin(step / 50) for step in range(10_000)]
    values[4321], values[8765] = 7.0, math.nan
    long = Series(tuple(range(10_000)), tuple(values))
    steps = kept_steps([long])
    assert len(steps) <= 2 * 200 + 2
    assert {0, 4321, 9999} <= set(steps)
    short = Series((1, 5), (1.0, 2.0))
    assert kept_steps([short, Series((2,), (1.0,))]) == [1, 2, 5]


def test_a_long_run_says_how_many_steps_are_drawn(tmp_path):
    path = make_run(tmp_path / "run", [])
    folder = RunFolder(path)
    folder.go_on()
    for step in range(1, 1001):
        folder.log(step, {"rollout/reward": (step * 7919 % 1000) / 1000})
    folder.close()
    ((reward,),) = curves_of_run(read_run(path)).values()
    assert reward["all_steps"] == 1000 and 300 < len(reward["steps"]) <= 402
    line = dict(zip(reward["steps"], reward["lines"][0]["values"], strict=True))
    assert max(line.values()) == 0.999 and min(line.values()) == 0.0
