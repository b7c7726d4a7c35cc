"""A checkpoint is there whole or not at all, and one that is not whole is refused."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from tir_alp import checkpoint
from tir_alp.checkpoint import CheckpointError, Position
from tir_alp.tiny.model import make_model, make_tokenizer


@pytest.fixture(scope="module")
def model():
    return make_model(seed=0)


def save(folder, model, step, keep=9):
    position = Position(step=step, group=16 * step, policy_version=step)
    state = {"optimizer": {"moment": torch.full((3,), float(step))}}
    return checkpoint.save(folder, model, make_tokenizer(), state, position, keep=keep)


def test_a_checkpoint_is_a_hugging_face_folder_and_knows_where_the_run_stood(tmp_path, model):
    path = save(tmp_path, model, step=7)
    loaded = AutoModelForCausalLM.from_pretrained(path).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())
    assert checkpoint.verify(path) == Position(step=7, group=112, policy_version=7)
    assert checkpoint.load_state(path)["optimizer"]["moment"].tolist() == [7.0] * 3


def test_the_newest_is_by_number_and_old_ones_go(tmp_path, model):
    for step in (2, 9, 10):
        save(tmp_path, model, step, keep=2)
    assert checkpoint.newest(tmp_path)[1].step == 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_10", "step_9"]


@pytest.mark.parametrize("name", ["model.safetensors", "trainer.pt", "tokenizer.json"])
def test_a_torn_checkpoint_is_refused_and_the_last_good_one_is_used(tmp_path, model, name):
    good = save(tmp_path, model, step=1)
    torn = save(tmp_path, model, step=2) / name
    torn.write_bytes(torn.read_bytes()[:-1])
    path, position, refused = checkpoint.newest(tmp_path)
    assert (path, position.step) == (good, 1)
    assert refused == [f"{torn.parent} is torn: {name} is not what was saved"]


def test_a_missing_file_is_named(tmp_path, model):
    path = save(tmp_path, model, step=1)
    (path / "trainer.pt").unlink()
    with pytest.raises(CheckpointError, match=r"trainer\.pt is missing"):
        checkpoint.verify(path)


def test_a_foreign_folder_is_refused(tmp_path, model):
    path = save(tmp_path, model, step=1)
    (path / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint to resume from") as refusal:
        checkpoint.newest(tmp_path)
    assert "no readable manifest" in str(refusal.value)


def test_a_checkpoint_of_another_format_is_refused(tmp_path, model):
    path = save(tmp_path, model, step=1)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"format": "other 9"}))
    with pytest.raises(CheckpointError, match="of the format 'other 9'"):
        checkpoint.verify(path)


def test_what_a_crash_left_half_written_is_not_a_checkpoint(tmp_path, model):
    (tmp_path / ".step_5.part").mkdir()
    (tmp_path / ".step_5.part" / "model.safetensors").write_bytes(b"half")
    save(tmp_path, model, step=4)
    assert checkpoint.newest(tmp_path)[1].step == 4
    assert save(tmp_path, model, step=5).is_dir()
