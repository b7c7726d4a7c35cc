"""The run folder, in the state in which a killed run leaves it."""

import json
from pathlib import Path

import pytest

from tir_alp.config import Config
from tir_alp.records.folder import RunFolder, read_records


def test_reopening_drops_broken_and_incomplete_lines(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.create(Config())
    folder.log(1, {"rollout/reward": 0.25})
    folder.close()
    file = folder.path / "metrics.jsonl"
    with file.open("a") as lines:
        lines.write('{"step": 1, "}\nnull\n{"step": 2, "rollout/reward": 0.5}\n{"step": 3, "kl')
    assert (
        read_records(file)[1] == 2
    )  # an incomplete last line does not count: the file may still be written
    folder.reopen(step=1)
    folder.log(2, {"rollout/reward": 0.75})
    folder.close()
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert found == [{"step": 1, "rollout/reward": 0.25}, {"step": 2, "rollout/reward": 0.75}]


def test_a_place_that_cannot_be_written_is_refused_before_anything_starts(tmp_path):
    (tmp_path / "runs").touch()
    with pytest.raises(
        ValueError, match=r"runs is not a folder\. Runs and evaluations are written"
    ):
        RunFolder(tmp_path / "runs" / "a").check_is_new()
    with pytest.raises(ValueError, match=r"/proc.* cannot be written"):
        RunFolder(Path("/proc/sys/kernel/runs/a")).check_is_new()
