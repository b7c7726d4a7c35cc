"""Corrections: with which weight does a token count where trainer and engine disagree on it?

A correction looks at w, the ratio of the proximal over the rollout policy at a level of its own,
and turns it into a weight on the token's loss; `CORRECTIONS` holds them. A new one is a function
and an entry here; one that stands in a module of your own is used as
`correction = { type = "my_module:NAME" }`.

Importing this module does not import torch, so that the configuration can read the table quickly:
tensors are only touched through their own methods.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from tir_alp.algorithm.presets import CorrectionConfig


class CorrectionFunction(Protocol):
    """Maps ratios to weights."""

    def __call__(self, ratios: Tensor, correction: CorrectionConfig, /) -> Tensor:
        """Both tensors are [B, T]; a weight of 0 rejects the token. There is no gradient."""
        ...


@dataclass(frozen=True, slots=True)
class Correction:
    """An entry of `CORRECTIONS`."""

    function: CorrectionFunction
    formula: Callable[[CorrectionConfig], str]
    """Writes the weight of a token."""
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Presets that the entry brings: name -> the settings that differ from those of `grpo`."""


def ratio_text(how: CorrectionConfig) -> str:
    """Name the ratio that a correction looks at."""
    return f"{how.level} ratio pi_proximal / pi_rollout"


def _truncate(ratios: Tensor, correction: CorrectionConfig) -> Tensor:
    """w, raised to low and lowered to high."""
    return ratios.clamp(correction.low, correction.high)


def _truncate_formula(correction: CorrectionConfig) -> str:
    text = ratio_text(correction)
    if correction.high is not None:
        text = f"min({text}, {correction.high:g})"
    return f"max({text}, {correction.low:g})" if correction.low else text


def _mask(ratios: Tensor, correction: CorrectionConfig) -> Tensor:
    """Keep w inside [low, high], bounds included, and 0 elsewhere."""
    inside = ratios >= correction.low
    if correction.high is not None:
        inside = inside & (ratios <= correction.high)
    return ratios.where(inside, 0)


def _mask_formula(correction: CorrectionConfig) -> str:
    high = "inf" if correction.high is None else f"{correction.high:g}"
    return f"{ratio_text(correction)} where it is in [{correction.low:g}, {high}], else 0"


def _by_level(name: str, **settings: float) -> dict[str, dict[str, Any]]:
    """Return the presets `name_token` and `name_sequence` of a correction."""
    return {
        f"{name}_{level}": {"correction": {"type": name, "level": level, **settings}}
        for level in ("token", "sequence")
    }


_KPOP = {
    "correction": {"type": "tis", "high": None},
    "rejection": {"measure": "binary_kl", "high": 0.1, "normalise": "all"},
}
_NORMALISED = {"correction": {"type": "tis", "level": "sequence", "high": 2.0, "mean_one": True}}

CORRECTIONS: dict[str, Correction] = {
    "tis": Correction(
        _truncate,
        _truncate_formula,
        {**_by_level("tis", high=2.0), "tis_normalised": _NORMALISED, "kpop": _KPOP},
    ),
    "mis": Correction(_mask, _mask_formula, _by_level("mis", low=0.5, high=2.0)),
    "icepop": Correction(
        _mask,
        _mask_formula,
        {"icepop": {"correction": {"type": "icepop", "low": 0.5, "high": 5.0}}},
    ),
}
