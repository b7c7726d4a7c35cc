"""Corrections and rejections: what is done where trainer and engine disagree on a token?

Both look at w, the ratio of the proximal over the rollout policy at a level of their own. A
correction turns w into a weight on the token's loss; `CORRECTIONS` holds them. A new one is a
function and an entry here; one that stands in a module of your own is used as
`correction = { type = "my_module:NAME" }`. A rejection takes tokens out of the loss and leaves the
weight of the others alone.

Importing this module does not import torch, so that the configuration can read the table quickly:
tensors are only touched through their own methods.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from tir_alp.algorithm.presets import CorrectionConfig, RejectionConfig


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


def ratio_text(how: CorrectionConfig | RejectionConfig) -> str:
    """Name the ratio that a correction or a rejection looks at."""
    return f"{how.level} ratio pi_proximal / pi_rollout"


def _truncate(ratios: Tensor, correction: CorrectionConfig) -> Tensor:
    """min(w, high)."""
    return ratios.clamp(max=correction.high)


def _truncate_formula(correction: CorrectionConfig) -> str:
    return f"min({ratio_text(correction)}, {correction.high:g})"


def _mask(ratios: Tensor, correction: CorrectionConfig) -> Tensor:
    """Keep w inside [low, high], bounds included, and 0 elsewhere."""
    inside = (ratios >= correction.low) & (ratios <= correction.high)
    return ratios.where(inside, 0)


def _mask_formula(correction: CorrectionConfig) -> str:
    window = f"[{correction.low:g}, {correction.high:g}]"
    return f"{ratio_text(correction)} where it is in {window}, else 0"


def is_kept(token_ratios: Tensor, level_ratios: Tensor, rejection: RejectionConfig) -> Tensor:
    """Return which tokens a rejection keeps; all tensors are [B, T].

    These are the tokens whose ratio at the rejection's level is inside [low, high], bounds
    included, in sequences without a token whose own ratio is below the veto.
    """
    kept = level_ratios >= rejection.low
    if rejection.high is not None:
        kept = kept & (level_ratios <= rejection.high)
    return kept & ~(token_ratios < rejection.veto).any(-1, keepdim=True)


def _by_level(name: str, **settings: float) -> dict[str, dict[str, Any]]:
    """Return the presets `name_token` and `name_sequence` of a correction."""
    return {
        f"{name}_{level}": {"correction": {"type": name, "level": level, **settings}}
        for level in ("token", "sequence")
    }


CORRECTIONS: dict[str, Correction] = {
    "tis": Correction(_truncate, _truncate_formula, _by_level("tis", high=2.0)),
    "mis": Correction(_mask, _mask_formula, _by_level("mis", low=0.5, high=2.0)),
    "icepop": Correction(
        _mask,
        _mask_formula,
        {"icepop": {"correction": {"type": "icepop", "low": 0.5, "high": 5.0}}},
    ),
}
