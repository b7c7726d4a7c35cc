"""LoRA by peft: adapters that are trained, and the weights into which they are merged.

Only this module uses peft. An engine gets the adapters if it takes them, else merged weights; a
checkpoint has both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tir_alp.config import LoraConfig
from tir_alp.training.policy import cast_parameters

_BASE = ".base_layer."  # peft's name for the layer that an adapter extends
_ADAPTER = ".default."  # peft's name for the only adapter


class Adapters:
    """The adapters of a model. The model is changed in place: its weights are frozen.

    The random factors come from a seed of their own, so that they are equal on all ranks.

    Args:
        model: A causal LM that is not sharded yet.
        config: Rank and scale of the adapters.
        dtype: Type of the frozen weights, to save memory; adapters stay float32.

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
        cast_parameters(model, dtype)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self._peft = peft.get_peft_model(model, settings)
        self._scale = config.alpha / config.rank
        self._transposed = frozenset(  # layers whose weight is [in, out], such as GPT-2's
            name for name, each in model.named_modules() if getattr(each, "fan_in_fan_out", False)
        )

    def short_name(self, name: str) -> str:
        """Return the name of an adapter's factor without peft's name for the adapter."""
        return name.replace(_ADAPTER, ".")

    def merged(self, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Convert the whole tensors of the model into those of a model without adapters.

        A merged weight is W + alpha / rank * B A, in float32. The tensors of a layer must follow
        one another, its own weight first, as they do in a state dict.
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
                change = tensor @ factor
                if base[0].removesuffix(".weight") in self._transposed:
                    change = change.T
                yield base[0], base[1].float().add(change, alpha=self._scale)
                base = factor = None
            else:
                yield name.replace(_BASE, "."), tensor.float()

    def save(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write the adapters in peft's format."""
        prefix = "base_model.model."
        whole = {prefix + name: tensor for name, tensor in weights.items()}
        self._peft.save_pretrained(str(folder), state_dict=whole)
