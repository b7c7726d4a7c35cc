"""Adapters on their way to an engine: which layers have them, how they are named and described.

An engine gets the two factors of each adapted layer, `MODULE.lora_A.weight` [rank, in] and
`MODULE.lora_B.weight` [out, rank]; the layer then computes W x + alpha / rank * B A x. Servers read
them in peft's format, whose names begin with those of a wrapper.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tir_alp.config import LoraConfig

FIRST, SECOND = ".lora_A.weight", ".lora_B.weight"
MERGED_HINT = 'if it cannot adapt these layers, set trainer.lora.sync = "merged"'
"""What to do when a server does not start with adapters."""

_WRAPPER = "base_model.model."
_FILE = "adapter_model.safetensors"


def adapter_tensors(source: Mapping[str, Tensor] | Path) -> Mapping[str, Tensor]:
    """Return adapters by name, read from the folder of a checkpoint if they are in one.

    Raises:
        ValueError: If the folder has none, or these are not pairs of factors.
    """
    if isinstance(source, Path):
        file = source / "adapters" / _FILE
        if not file.is_file():
            raise ValueError(f"there are no adapters in {file.parent}")
        source = {name.removeprefix(_WRAPPER): each for name, each in load_file(file).items()}
    modules = adapted_modules(source)
    wrong = source.keys() ^ {module + factor for module in modules for factor in (FIRST, SECOND)}
    if wrong or not modules:
        first = min(wrong, default="nothing at all")
        raise ValueError(f"the engine takes adapters, which are pairs of factors, but got {first}")
    return source


def adapted_modules(names: Iterable[str]) -> list[str]:
    """Return the modules whose second factor is among some tensors, in order."""
    return [name.removesuffix(SECOND) for name in names if name.endswith(SECOND)]


def target_modules(model: Any) -> list[str]:
    """Return the last parts of the names of all linear layers but the head.

    Args:
        model: A causal LM, with or without its weights.
    """
    head = model.get_output_embeddings()
    return sorted(
        {
            name.rpartition(".")[2]
            for name, each in model.named_modules()
            if isinstance(each, nn.Linear) and each is not head
        }
    )


def peft_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return adapters by the names that peft gives them."""
    return {_WRAPPER + name: each for name, each in tensors.items()}


def peft_config(config: LoraConfig, names: Iterable[str]) -> dict[str, Any]:
    """Describe adapters as peft does.

    Args:
        config: Their rank and scale.
        names: Names of their tensors.
    """
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({each.rpartition(".")[2] for each in adapted_modules(names)}),
    }


def write_adapters(folder: Path, config: LoraConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write adapters to a new folder in peft's format, for a server that reads it."""
    folder.mkdir(parents=True)
    save_file(peft_names(tensors), folder / _FILE)
    (folder / "adapter_config.json").write_text(json.dumps(peft_config(config, tensors)))


def snapshot_adapters(source: Mapping[str, Tensor] | Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """Copy adapters to the host in a server's dtype."""
    tensors = adapter_tensors(source)
    return {
        name: each.detach().to("cpu", dtype, copy=True).contiguous()
        for name, each in tensors.items()
    }
