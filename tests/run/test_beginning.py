"""Where runs of both kinds begin or go on, and what keeps them from it."""

import pytest

from tests.run.test_supervise import save
from tir_alp.models.tiny import BASE
from tir_alp.run.beginning import beginning, check_files, check_steps, first_weights
from tir_alp.run.data_fingerprint import fingerprints, write_fingerprints
from tir_alp.training.checkpoint_folder import Position


@pytest.fixture
def said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return []


def test_a_new_run_begins_at_its_name_with_the_model_that_was_named(tmp_path, said):
    begin = beginning("mine", None, said.append)
    assert (str(begin.folder.path), begin.position, begin.checkpoint) == (
        "runs/mine",
        Position(0, 0),
        None,
    )
    weights = first_weights("tiny", begin, said.append)
    assert weights.tokenizer.name_or_path == weights.initial
    check_steps(begin, 0)
    assert said == [] and not (tmp_path / "runs").exists()


def test_a_taken_name_is_refused_before_anything_is_read(tmp_path, said):
    (tmp_path / "runs/mine").mkdir(parents=True)
    with pytest.raises(ValueError, match="runs/mine exists: resume it with --resume runs/mine"):
        beginning("mine", None, said.append)


def test_a_run_goes_on_from_its_newest_whole_checkpoint(tmp_path, said):
    run = tmp_path / "run"
    for step in (3, 7):
        run.mkdir(exist_ok=True)
        save(run, step)
    (run / "checkpoints/step_7/weights").write_text("torn")
    begin = beginning("another", run, said.append)
    assert begin.folder.path == run and begin.position == Position(3, 3)
    (line,) = said
    assert "refused: " in line and "step_7 is torn" in line and line.endswith("step_3")
    with pytest.raises(ValueError, match="has made its 3 steps: give --steps more to go on"):
        check_steps(begin, 3)
    check_steps(begin, 4)


def test_a_run_without_a_checkpoint_cannot_go_on(tmp_path, said):
    with pytest.raises(ValueError, match="there is no checkpoint in"):
        beginning("another", tmp_path, said.append)


def test_changed_data_is_refused_only_where_a_run_goes_on(tmp_path, said):
    tasks, run = tmp_path / "tasks.jsonl", tmp_path / "run"
    tasks.write_text("{}\n")
    run.mkdir()
    save(run, 3)
    write_fingerprints(run, fingerprints([tasks]))
    tasks.write_text("[]\n")
    check_files(beginning("new", None, said.append), fingerprints([tasks]))
    with pytest.raises(ValueError, match="is not the data that"):
        check_files(beginning("new", run, said.append), fingerprints([tasks]))


def test_a_model_folder_that_lacks_a_part_is_named(tmp_path, said):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text((BASE / "config.json").read_text())
    with pytest.raises(ValueError, match=r"the model folder .*model has no weights: it needs"):
        first_weights(str(tmp_path / "model"), beginning("new", None, said.append), said.append)
