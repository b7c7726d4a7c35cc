"""Pure mathematics: from logprobs to a loss, the noise of ALP, and the presets.

The public names are imported when they are first used: the configuration reads the presets, and
an error in it is to be reported without waiting for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tir_alp.algorithm.loss import LossCounts, LossInputs, loss_counts, policy_loss
    from tir_alp.algorithm.perturbation import LayerwisePerturbation, NoiseKey
    from tir_alp.algorithm.presets import (
        ALGORITHMS,
        AlgorithmConfig,
        CorrectionConfig,
        KLConfig,
        PerturbationConfig,
        RejectionConfig,
    )

__all__ = [
    "ALGORITHMS",
    "AlgorithmConfig",
    "CorrectionConfig",
    "KLConfig",
    "LayerwisePerturbation",
    "LossCounts",
    "LossInputs",
    "NoiseKey",
    "PerturbationConfig",
    "RejectionConfig",
    "loss_counts",
    "policy_loss",
]

_MODULES = {
    "loss": ("LossCounts", "LossInputs", "loss_counts", "policy_loss"),
    "perturbation": ("LayerwisePerturbation", "NoiseKey"),
    "presets": (
        "ALGORITHMS",
        "AlgorithmConfig",
        "CorrectionConfig",
        "KLConfig",
        "PerturbationConfig",
        "RejectionConfig",
    ),
}


def __getattr__(name: str) -> Any:
    """Import a public name from the module that defines it."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
