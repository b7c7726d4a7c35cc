"""LoRA by peft: adapters that are trained, and the merged weights that an engine samples with.

Everything that knows of peft is here. An engine, and a Hugging Face folder, never see an adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tir_alp.config import LoraConfig

_BASE = ".base_layer."  # peft's name for the layer that an adapter stands beside


class Adapters:
    """The adapters of a model, which is changed in place: its weights freeze.

    Their random factors come from a seed of their own, so that all ranks make the same.

    Args:
        model: A causal LM whose layers are still whole.
        config: Their rank and scale.
        dtype: Of the frozen weights, to save memory; adapters stay float32.

    Raises:
        ValueError: If peft is not installed, or the model has no linear layers.
    """

    def __init__(self, model: Any, config: LoraConfig, dtype: torch.dtype) -> None:
        try:
            import peft
        except ImportError as error:
            raise ValueError("trainer.lora needs peft: pip install 'tir_alp[lora]'") from error
        settings = peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,  # type: ignore[arg-type]  # any number
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        model.to(dtype)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self._peft = peft.get_peft_model(model, settings)
        self._scale = config.alpha / config.rank

    def merged(self, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Turn the whole tensors of the model into those of one without adapters.

        W + alpha / rank * B A, in float32. A layer's tensors must follow one another, its own
        weight first, as they do in a state dict.
        """
        base: tuple[str, Tensor] | None = None
        factor = None
        for name, tensor in tensors:
            if name.endswith(".base_layer.weight"):
                base = name.replace(_BASE, "."), tensor
            elif ".lora_A." in name:
                factor = tensor
            elif ".lora_B." in name:
                assert base is not None and factor is not None
                yield base[0], base[1].float().addmm(tensor, factor, alpha=self._scale)
                base = factor = None
            else:
                yield name.replace(_BASE, "."), tensor.float()

    def save(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write the adapters in peft's format."""
        prefix = "base_model.model."
        whole = {prefix + name: tensor for name, tensor in weights.items()}
        self._peft.save_pretrained(str(folder), state_dict=whole)
