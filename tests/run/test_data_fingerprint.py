"""A run is not resumed on another file of tasks than it began with."""

import pytest

from tir_alp.run.data_fingerprint import check_fingerprints, fingerprints, write_fingerprints


def test_a_changed_file_is_refused_by_name(tmp_path):
    tasks, run = tmp_path / "tasks.jsonl", tmp_path / "run"
    run.mkdir()
    tasks.write_text("{}\n")
    write_fingerprints(run, fingerprints([tasks]))
    check_fingerprints(run, fingerprints([tasks]))
    tasks.write_text("[]\n")  # of the same length
    with pytest.raises(ValueError, match=r"tasks.jsonl is not the file that .* began with"):
        check_fingerprints(run, fingerprints([tasks]))


def test_without_files_nothing_is_written(tmp_path):
    write_fingerprints(tmp_path, fingerprints([]))
    assert not (tmp_path / "data.json").exists()
    check_fingerprints(tmp_path, fingerprints([]))
