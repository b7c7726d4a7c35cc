"""Pure mathematics: from logprobs to a loss, the noise of ALP, and the presets.

Public names are imported on first use: the configuration reads the presets and the tables, and an
error in it should be reported without waiting for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tir_alp.algorithm.advantage import ADVANTAGES, Advantage
    from tir_alp.algorithm.aggregations import AGGREGATIONS, Aggregation
    from tir_alp.algorithm.corrections import CORRECTIONS, Correction
    from tir_alp.algorithm.inputs import LossInputs
    from tir_alp.algorithm.levels import RATIO_LEVELS, RatioLevel
    from tir_alp.algorithm.loss import LossCounts, loss_counts, policy_loss
    from tir_alp.algorithm.perturbation import LayerwisePerturbation, NoiseKey
    from tir_alp.algorithm.presets import (
        ALGORITHMS,
        AlgorithmConfig,
        CorrectionConfig,
        KLConfig,
        PerturbationConfig,
        RejectionConfig,
    )
    from tir_alp.algorithm.surrogates import SURROGATES, Surrogate

__all__ = [
    "ADVANTAGES",
    "AGGREGATIONS",
    "ALGORITHMS",
    "CORRECTIONS",
    "RATIO_LEVELS",
    "SURROGATES",
    "Advantage",
    "Aggregation",
    "AlgorithmConfig",
    "Correction",
    "CorrectionConfig",
    "KLConfig",
    "LayerwisePerturbation",
    "LossCounts",
    "LossInputs",
    "NoiseKey",
    "PerturbationConfig",
    "RatioLevel",
    "RejectionConfig",
    "Surrogate",
    "loss_counts",
    "policy_loss",
]

_MODULES = {
    "advantage": ("ADVANTAGES", "Advantage"),
    "aggregations": ("AGGREGATIONS", "Aggregation"),
    "corrections": ("CORRECTIONS", "Correction"),
    "inputs": ("LossInputs",),
    "levels": ("RATIO_LEVELS", "RatioLevel"),
    "loss": ("LossCounts", "loss_counts", "policy_loss"),
    "perturbation": ("LayerwisePerturbation", "NoiseKey"),
    "presets": (
        "ALGORITHMS",
        "AlgorithmConfig",
        "CorrectionConfig",
        "KLConfig",
        "PerturbationConfig",
        "RejectionConfig",
    ),
    "surrogates": ("SURROGATES", "Surrogate"),
}


def __getattr__(name: str) -> Any:
    """Import a public name from the module that defines it."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
