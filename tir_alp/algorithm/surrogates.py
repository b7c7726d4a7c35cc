"""Surrogates: what loss does a token have, given its ratio and its advantage?

`SURROGATES` holds them. A new one is a function and an entry here; one that stands in a module of
your own is used as `surrogate = "my_module:NAME"`. Importing this module does not import torch, so
that the configuration can read the table quickly: tensors are only touched through their own
methods.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from tir_alp.algorithm.presets import AlgorithmConfig


class SurrogateFunction(Protocol):
    """Computes the loss of each token, and which tokens are clipped."""

    def __call__(
        self, ratios: Tensor, logprobs: Tensor, advantages: Tensor, algorithm: AlgorithmConfig, /
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """All tensors are [B, T].

        Outside the mask, ratios are 1 and logprobs and advantages are 0.

        Args:
            ratios: Ratio at the algorithm's level, between e^-20 and e^20.
            logprobs: Logprob of each token under the policy that is trained, in nats.
            advantages: Advantage of each token.
            algorithm: The method, whose settings the surrogate reads.

        Returns:
            Token losses, and for each side a bool tensor that is True for the clipped tokens.
        """
        ...


@dataclass(frozen=True, slots=True)
class Surrogate:
    """An entry of `SURROGATES`."""

    function: SurrogateFunction
    formula: Callable[[AlgorithmConfig], str]
    """Writes L_t in terms of r_t and A."""
    sides: tuple[str, ...] = ()
    """Names of the sides on which the function may clip; each is logged by its name."""
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Presets that the entry brings: name -> the settings that differ from those of `grpo`."""


def _window(algorithm: AlgorithmConfig) -> tuple[float, float]:
    return 1 - algorithm.clip_low, 1 + algorithm.clip_high


def _clip(
    ratios: Tensor, logprobs: Tensor, advantages: Tensor, algorithm: AlgorithmConfig
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """PPO: max(-A r, -A clip(r)), and for A < 0 at most -A c: equation (5)."""
    low, high = _window(algorithm)
    losses = (-advantages * ratios).maximum(-advantages * ratios.clamp(low, high))
    clipped = {
        "low": (advantages < 0) & (ratios < low),
        "high": (advantages > 0) & (ratios > high),
    }
    if algorithm.dual_clip is not None:
        clipped["dual"] = (advantages < 0) & (ratios > algorithm.dual_clip)
        losses = (-advantages * algorithm.dual_clip).where(clipped["dual"], losses)
    return losses, clipped


def _clip_formula(algorithm: AlgorithmConfig) -> str:
    low, high = _window(algorithm)
    text = f"max(-A r_t, -A clip(r_t, {low:g}, {high:g}))"
    if algorithm.dual_clip is not None:
        text += f", and for A < 0 at most -{algorithm.dual_clip:g} A"
    return text


def _cispo(
    ratios: Tensor, logprobs: Tensor, advantages: Tensor, algorithm: AlgorithmConfig
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """-sg[clip(r)] A log pi: a clipped token keeps a gradient, with a bounded weight."""
    low, high = _window(algorithm)
    losses = -ratios.detach().clamp(low, high) * advantages * logprobs
    return losses, {"low": ratios < low, "high": ratios > high}


def _cispo_formula(algorithm: AlgorithmConfig) -> str:
    low, high = _window(algorithm)
    return f"-sg[clip(r_t, {low:g}, {high:g})] A log pi(y_t)"


def _reinforce(
    ratios: Tensor, logprobs: Tensor, advantages: Tensor, algorithm: AlgorithmConfig
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """-A log pi: neither ratio nor clip; off-policy samples are left to the correction."""
    return -advantages * logprobs, {}


SURROGATES: dict[str, Surrogate] = {
    "clip": Surrogate(_clip, _clip_formula, sides=("low", "high", "dual")),
    "cispo": Surrogate(
        _cispo,
        _cispo_formula,
        sides=("low", "high"),
        presets={"cispo": {"surrogate": "cispo", "dual_clip": None}},
    ),
    "reinforce": Surrogate(_reinforce, lambda _: "-A log pi(y_t)"),
}


def clip_sides() -> tuple[str, ...]:
    """Return every side on which a surrogate of the table may clip, without repetition."""
    return tuple(dict.fromkeys(side for each in SURROGATES.values() for side in each.sides))
