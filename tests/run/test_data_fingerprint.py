"""A run is not resumed on another file of tasks than it began with."""

import pytest

from tir_alp.config import DataConfig
from tir_alp.run.data_fingerprint import check_fingerprints, fingerprints, write_fingerprints


def test_a_changed_file_is_refused_by_name(tmp_path):
    tasks, run = tmp_path / "tasks.jsonl", tmp_path / "run"
    run.mkdir()
    tasks.write_text("{}\n")
    data = DataConfig(source="jsonl", path=tasks)
    write_fingerprints(run, fingerprints(data))
    check_fingerprints(run, fingerprints(data))
    tasks.write_text("[]\n")  # of the same length
    with pytest.raises(ValueError, match=r"tasks.jsonl is not the file that .* began with"):
        check_fingerprints(run, fingerprints(data))


def test_each_file_of_a_mixture_counts_and_generated_tasks_have_none(tmp_path):
    files = [tmp_path / name for name in ("a.jsonl", "b.jsonl")]
    for file in files:
        file.write_text(f"{file.name}\n")
    mix = [{"source": "jsonl", "path": file} for file in files] + [{"source": "arithmetic"}]
    assert list(fingerprints(DataConfig(mix=mix))) == list(map(str, files))  # type: ignore[arg-type]
    write_fingerprints(tmp_path, fingerprints(DataConfig()))
    assert not (tmp_path / "data.json").exists()
    check_fingerprints(tmp_path, fingerprints(DataConfig()))
