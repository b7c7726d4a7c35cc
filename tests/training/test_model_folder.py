"""What is wrong with a model's folder is one line that says what to do."""

import json
import shutil

import pytest

from tir_alp.models.tiny import ABLE
from tir_alp.training.model_folder import check_model_folder, check_tokenizer_files
from tir_alp.training.policy import load_policy, load_tokenizer
from tir_alp.training.structure import declared_end_token_ids, load_outline


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(ABLE, tmp_path / "model")


def line(call, *arguments):
    with pytest.raises(ValueError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_whole_folder_and_an_id_pass(folder):
    check_model_folder(str(folder))
    check_model_folder("org/model")


def test_no_path_is_not_the_working_folder():
    assert "model.path is empty" in line(check_model_folder, "")


def test_a_folder_with_a_config_alone(folder):
    for each in folder.iterdir():
        if each.name != "config.json":
            each.unlink()
    assert "has no weights: it needs model.safetensors" in line(check_model_folder, str(folder))
    assert "copy tokenizer.json" in line(check_tokenizer_files, folder)
    assert "copy tokenizer.json" in line(load_tokenizer, str(folder))


def test_a_folder_of_another_kind(folder):
    (folder / "config.json").unlink()
    assert "has no config.json" in line(check_model_folder, str(folder))
    (folder / "model-q4.gguf").touch()
    said = line(declared_end_token_ids, str(folder))
    assert f"give the file itself, {folder}/model-q4.gguf" in said


def test_a_file_is_not_a_folder(folder):
    file = folder / "model.safetensors"
    assert f"is a file: give the folder that it is in, {folder}" in line(load_policy, str(file))


def test_a_name_that_is_neither_a_folder_nor_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "there is no model folder 'smolm2', and no model" in line(load_outline, "smolm2")


def test_a_folder_that_contains_the_model_s_folder(folder):
    assert f"did you mean {folder}?" in line(check_model_folder, str(folder.parent))


def test_a_missing_shard(folder):
    (folder / "model.safetensors").unlink()
    shards = {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (folder / "model-1-of-2.safetensors").touch()
    assert "lacks 1 of its 2 files of weights; the first is model-2-of-2.safetensors" in line(
        check_model_folder, str(folder)
    )


def test_torn_weights(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    assert "download the files again" in line(load_policy, str(folder))


@pytest.mark.parametrize("kind", ["qwen9", "vit"], ids=["unknown", "no language model"])
def test_another_architecture_does_not_propose_an_upgrade(folder, kind):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": kind}))
    message = line(load_outline, str(folder))
    assert "take another model" in message and "upgrade" not in message and len(message) < 400
