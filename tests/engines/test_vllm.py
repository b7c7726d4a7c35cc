"""What can be tested of the vLLM engine without vLLM; the rest is in the conformance suite."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.engines.harness import model
from tir_alp.config import VLLMConfig

vllm_process = pytest.importorskip("tir_alp.engines.vllm.process")


def test_a_tied_head_is_written_as_a_tensor_of_its_own(tmp_path):
    tensors = vllm_process.write_start(
        tmp_path / "start", model(), model().state_dict(), torch.bfloat16
    )
    written = load_file(tmp_path / "start" / "model.safetensors")
    assert written.keys() == tensors.keys() == model().state_dict().keys()
    assert torch.equal(written[vllm_process.HEAD], written[vllm_process.EMBEDDING])
    config = json.loads((tmp_path / "start" / "config.json").read_text())
    assert (config["tie_word_embeddings"], config["architectures"]) == (False, ["LlamaForCausalLM"])
    model().save_pretrained(tmp_path / "saved")  # without the head
    again = vllm_process.write_start(
        tmp_path / "again", model(), tmp_path / "saved", torch.bfloat16
    )
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)
    with pytest.raises(ValueError, match=r"lack 1 tensors of the model.*'model\.norm\.weight'"):
        tensors.pop("model.norm.weight")
        vllm_process.write_start(tmp_path / "third", model(), tensors, torch.bfloat16)


def test_a_python_that_is_not_there_is_named(tmp_path):
    config = VLLMConfig(type="vllm", python=Path("/no/python"), device="cpu")
    with pytest.raises(ValueError, match=r"engine.python = '/no/python' is no program"):
        vllm_process.server_process(config, tmp_path, 0, print)


@pytest.mark.parametrize(
    ("seen", "first", "count", "names"),
    [(None, 1, 2, "1,2"), ("4,5,6", 1, 2, "5,6"), ("GPU-a,GPU-b", 0, 1, "GPU-a")],
)
def test_a_server_gets_its_gpus_among_those_of_its_parent(monkeypatch, seen, first, count, names):
    """An actor of a cluster sees only its own GPUs, under any numbers."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if seen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
        with pytest.raises(ValueError, match="first_gpu = 9"):
            vllm_process.gpus(9, 1)
    assert vllm_process.gpus(first, count) == names
