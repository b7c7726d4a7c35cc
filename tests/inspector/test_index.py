"""The index: it grows with the run, forgets what has gone, and answers queries."""

import json
import os

import pytest

from tests.inspector.made import add_step, rewrite, trajectory, write_run
from tir_alp.inspector.index import Query, TrajectoryIndex
from tir_alp.records.folder import RunFolder

STEPS = [
    [trajectory(0, ("2 + 2", "4"), 1.0, answer="4"), trajectory(1, ("2 + 2", "call", "out", "5"))],
    [trajectory(2, ("3 + 3", "six"), 0.5), trajectory(3, ("3 + 3", "call", "6", "6"), 1.0)],
]


@pytest.fixture
def index(tmp_path):
    found = TrajectoryIndex(write_run(tmp_path / "run", STEPS))
    assert found.refresh() == 0
    return found


def uids(index, **query):
    return [row["uid"] for row in index.select(Query(**query))[1]]


def test_a_row_says_what_the_record_says(index):
    (row,) = index.select(Query(ranges={"uid": (1, 1)}))[1]
    assert row["step"] == 1 and row["line"] == 2 and row["turns"] == 2
    assert row["reward"] == 0 and row["advantage"] == -0.5 and row["tool_calls"] == 1
    assert row["tokens"] == len("2 + 2callout5") and row["sampled"] == row["loss_tokens"] == 5
    assert row["preview"] == "call5" and row["answer"] is None
    assert index.record(row)["sequence_uid"] == 1


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({"sort": "reward", "descending": True}, [3, 0, 2, 1]),
        ({"sort": "tokens", "descending": False}, [0, 2, 3, 1]),
        ({"ranges": {"tool_calls": (0, 0)}}, [2, 0]),
        ({"ranges": {"reward": (0.5, None)}, "sort": "uid", "descending": False}, [0, 2, 3]),
        ({"ranges": {"step": (1, 1)}}, [0, 1]),
        ({"words": {"outcome": "ok"}, "limit": 1, "offset": 1}, [3]),
        ({"text": "SIX"}, [2]),
        ({"text": "task/1"}, [2, 3]),
        ({"text": "' OR 1=1 --"}, []),
        ({"sort": "uid; DROP TABLE rows", "descending": False}, [0, 1, 2, 3]),
        ({"words": {"uid = 0 OR 1": "x"}}, [2, 3, 0, 1]),
    ],
)
def test_queries(index, query, expected):
    assert uids(index, **query) == expected


def test_only_new_and_changed_files_are_read(index, monkeypatch):
    folder = RunFolder(index.path)
    folder.go_on()
    read = []
    monkeypatch.setattr(TrajectoryIndex, "_advantages", lambda self, step: read.append(step) or {})
    add_step(folder, 3, [trajectory(4, ("x", "y"))])
    index.refresh()
    assert read == [3] and len(uids(index)) == 5
    rewrite(
        index.path / "trajectories/step_000001.jsonl",
        lambda record: record["turns"][-1].update(reward=7.0),
    )
    index.refresh()
    assert read == [3, 1]
    assert {row["reward"] for row in index.select(Query(ranges={"step": (1, 1)}))[1]} == {7.0}
    folder.close()


def test_files_that_a_resumed_run_deletes_are_forgotten(index):
    (index.path / "trajectories/step_000002.jsonl").unlink()
    index.refresh()
    assert uids(index) == [0, 1]


def test_another_process_finds_the_index_and_reads_nothing(index, monkeypatch):
    monkeypatch.setattr(TrajectoryIndex, "_read", None)
    again = TrajectoryIndex(index.path)
    assert again.refresh() == 0 and len(uids(again)) == 4


def test_lines_that_are_no_trajectories_are_counted(index):
    file = index.path / "trajectories/step_000003.jsonl"
    bad = ["null", "{", '{"turns": 3}', '{"turns": [], "sequence_uid": {}}', "[" * 100_000]
    file.write_text("\n".join(bad) + "\n")
    assert index.refresh() == 0
    assert index.num_unreadable == len(bad) and len(uids(index)) == 4


def test_a_record_that_has_changed_is_not_taken_for_the_indexed_one(index):
    (row,) = index.select(Query(ranges={"uid": (2, 2)}))[1]
    file = index.path / "trajectories/step_000002.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join(reversed(lines)) + "\n")
    with pytest.raises(ValueError, match="no longer what was indexed"):
        index.record(row)


def test_a_run_that_cannot_be_written_is_indexed_elsewhere(tmp_path, monkeypatch):
    path = write_run(tmp_path / "run", STEPS)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    index = TrajectoryIndex(path)
    index.refresh()
    assert index.cache is not None and tmp_path / "cache" in index.cache.parents
    assert not (path / ".inspector.sqlite").exists() and len(uids(index)) == 4


def test_the_summary_is_of_all_rows_of_a_query(index):
    found = index.summary(Query(limit=1))
    assert found["total"] == 4 and found["reward"] == 0.625 and found["called"] == 0.5
    assert found["answers"] == {"none": 3, "4": 1} and found["outcomes"] == {"ok": 4}
    assert json.dumps(found)
