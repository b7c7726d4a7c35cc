"""The folder of a run, as a run that was killed leaves it behind."""

import json

from tir_alp.config import Config
from tir_alp.records.folder import RunFolder, read_rows


def test_a_run_goes_on_behind_a_broken_line_and_without_a_torn_one(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.create(Config())
    folder.log(1, {"rollout/reward": 0.25})
    folder.close()
    file = folder.path / "metrics.jsonl"
    with file.open("a") as rows:
        rows.write('{"step": 1, "}\nnull\n{"step": 2, "rollout/reward": 0.5}\n{"step": 3, "kl')
    assert read_rows(file)[1] == 2  # the torn one is how a file looks while it is written
    folder.reopen(step=1)
    folder.log(2, {"rollout/reward": 0.75})
    folder.close()
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert found == [{"step": 1, "rollout/reward": 0.25}, {"step": 2, "rollout/reward": 0.75}]
