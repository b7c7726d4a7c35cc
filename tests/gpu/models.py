"""The models that are measured: random weights of known shapes, and SmolLM2 where its folder is.

Reduced, a model has the same architecture and so few weights that a CPU computes it at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config

from tests.gpu.part import Task
from tir_alp.algorithm.sites import find_decoder_layers
from tir_alp.training.attention import PACKED
from tir_alp.training.policy import load_policy

NAMES = ("random-1.5b", "smollm2-135m")
SMALL: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "vocab_size": 1024,
}


def shape_of(name: str, *, is_reduced: bool) -> PretrainedConfig:
    """Return the config of Qwen2.5-1.5B or SmolLM2-135M."""
    if name == "random-1.5b":
        qwen: dict[str, Any] = {
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
        }
        return Qwen2Config(**qwen | (SMALL if is_reduced else {}))
    shape: dict[str, Any] = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }
    heads: dict[str, Any] = {"num_attention_heads": 3, "num_key_value_heads": 1}
    return LlamaConfig(**shape | (SMALL | heads if is_reduced else {}))


def folder_of(name: str, task: Task) -> Path | None:
    """Return the folder of the model's weights; None: they are random."""
    return task.smollm2 if name == "smollm2-135m" and not task.is_reduced else None


def make_model(name: str, task: Task) -> Any:
    """Return a model on the device, in float32 and with packed attention."""
    folder = folder_of(name, task)
    if folder is not None:
        return load_policy(str(folder), task.device)
    torch.manual_seed(0)
    with task.device:
        return AutoModelForCausalLM.from_config(
            shape_of(name, is_reduced=task.is_reduced),
            attn_implementation=PACKED,
            dtype=torch.float32,
        )


def num_multiplied(model: Any) -> tuple[int, int]:
    """Return how many weights multiply each token in the layers, and how many in the head."""
    layers = sum(each.numel() for each in find_decoder_layers(model).parameters())
    return layers, model.get_output_embeddings().weight.numel()
