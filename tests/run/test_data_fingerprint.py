"""A run is not resumed on another file of tasks than it began with."""

import pytest

from tir_alp.config import DataConfig
from tir_alp.rollouts.data import digests
from tir_alp.run.data_fingerprint import check_fingerprints, fingerprints, write_fingerprints


def test_a_changed_file_is_refused_by_name(tmp_path):
    tasks, run = tmp_path / "tasks.jsonl", tmp_path / "run"
    run.mkdir()
    tasks.write_text("{}\n")
    write_fingerprints(run, fingerprints([tasks]))
    check_fingerprints(run, fingerprints([tasks]))
    tasks.write_text("[]\n")  # of the same length
    with pytest.raises(
        ValueError, match=r"tasks.jsonl is not the data that .* began with: it had 3 bytes"
    ):
        check_fingerprints(run, fingerprints([tasks]))


def test_a_changed_data_set_of_the_hub_is_refused_by_name(tmp_path):
    datasets = pytest.importorskip("datasets")

    def digests_of(name, answer):
        rows = [{"question": f"{n}+1?", "answer": str(n + 1)} for n in range(20)]
        rows[7]["answer"] = answer
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / name)
        (found,) = digests([DataConfig(source="hub", dataset=str(tmp_path / name))]).values()
        return {"set": found}

    before, same, changed = (digests_of(*each) for each in (("a", "8"), ("b", "8"), ("c", "9")))
    write_fingerprints(tmp_path, before)
    assert before["set"]["rows"] == 20
    check_fingerprints(tmp_path, same)
    with pytest.raises(ValueError, match=r"set is not the data that .* began with: it had 20 rows"):
        check_fingerprints(tmp_path, changed)


def test_without_files_nothing_is_written(tmp_path):
    write_fingerprints(tmp_path, fingerprints([]))
    assert not (tmp_path / "data.json").exists()
    check_fingerprints(tmp_path, fingerprints([]))
