"""What a method is made of, typed: `ALGORITHMS` holds one `AlgorithmConfig` per method.

Two methods differ in these values and in nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    model_validator,
)


class Section(BaseModel):
    """A part of the configuration: frozen, and closed to keys that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class PerturbationConfig(Section):
    """The noise of ALP on the hidden state that enters a decoder layer (spec 1.2, 1.3)."""

    init_std: float = Field(default=0.01, ge=0.0)
    """Standard deviation of the noise before training; 0 switches it off exactly."""
    layers: tuple[int, int] | None = None
    """Half-open range of decoder layers that get noise; None: all of them."""
    learnable: bool = True
    """Whether each layer's sigma is trained."""
    scale: Literal["absolute", "relative"] = "absolute"
    """Unit of sigma: the hidden state's own unit, or the root mean square of each token's state."""
    site: Literal["hidden", "logits"] = "hidden"
    """Where the noise goes: into the decoder layers, or, as an ablation, on the logits alone."""
    draws: int = Field(default=1, ge=1)
    """Independent draws of the noise an update, whose losses are averaged; each costs a forward and
    a backward pass."""
    antithetic: bool = False
    """Whether every second draw is the negative of the one before it."""
    seed: int = 0
    """Root of every noise stream; a run adds its own seed to it."""

    @model_validator(mode="after")
    def _check(self) -> PerturbationConfig:
        if self.layers is not None and not 0 <= self.layers[0] < self.layers[1]:
            raise ValueError(f"layers is [start, stop) with 0 <= start < stop, not {self.layers}")
        if self.layers is not None and self.site == "logits":
            raise ValueError(f"layers {self.layers} has no meaning with site 'logits'")
        if self.antithetic and self.draws % 2:
            raise ValueError(f"antithetic draws come in pairs, but draws is {self.draws}")
        return self


Level = Literal[
    "token",
    "sequence",
    "sequence_geometric",
    "turn",
    "turn_geometric",
    "cumulative",
    "cumulative_geometric",
]
"""Over what a log ratio is summed (`_geometric`: averaged)."""


class CorrectionConfig(Section):
    """A detached weight on the loss against the mismatch of trainer and engine (spec 2)."""

    type: Literal["tis", "mis", "icepop"]
    """`tis` truncates the weight at `high`; `mis` and `icepop` keep it inside [low, high]."""
    level: Level = "token"
    """Where the ratio of proximal over rollout policy is formed."""
    low: float = Field(default=0.0, ge=0.0)
    """Weights below it are rejected; unused by `tis`."""
    high: float = Field(default=2.0, gt=0.0)
    """Weights above it are truncated (`tis`) or rejected."""
    normalise: Literal["all", "kept"] = "all"
    """Whether rejected tokens still count in the loss's denominator."""

    @model_validator(mode="after")
    def _check_window(self) -> CorrectionConfig:
        if self.low > self.high:
            raise ValueError(f"low ({self.low}) is above high ({self.high})")
        return self


class RejectionConfig(Section):
    """Takes out of the loss what trainer and engine disagree on; what stays keeps its weight."""

    level: Level = "token"
    """Where the ratio of proximal over rollout policy is formed that the window is for."""
    low: float = Field(default=0.0, ge=0.0)
    """Lower ratios are rejected."""
    high: float | None = Field(default=None, gt=0.0)
    """Higher ratios are rejected; None: none."""
    veto: float = Field(default=0.0, ge=0.0, lt=1.0)
    """A token with a lower ratio rejects its whole sequence, whatever the level; 0: none does."""
    normalise: Literal["all", "kept"] = "kept"
    """Whether rejected tokens still count in the loss's denominator."""

    @model_validator(mode="after")
    def _check_window(self) -> RejectionConfig:
        if self.high is not None and self.low > self.high:
            raise ValueError(f"low ({self.low}) is above high ({self.high})")
        return self


class KLConfig(Section):
    """A penalty on the distance to the reference policy."""

    estimator: Literal["k1", "k2", "k3"] = "k3"
    """With d = reference - current logprob: k1 = -d, k2 = d^2 / 2, k3 = e^d - d - 1."""
    gradient: Literal["estimator", "k2"] = "estimator"
    """Whose gradient the term has. That of k2 is, on average, that of the distance itself."""
    coefficient: float = Field(default=0.001, ge=0.0)
    """Weight of the term in the loss."""


class AlgorithmConfig(Section):
    """One policy-gradient method, as the choices that make it up (spec 1.7, 2)."""

    name: str = "custom"
    """What it is called in reports: the preset it comes from."""
    denominator: Literal["rollout", "proximal"]
    """Whose logprobs are under the ratio: the engine's, or the trainer's at the start of a step."""
    ratio_level: Level
    """Over what the log ratio is summed (`_geometric`: averaged)."""
    surrogate: Literal["clip", "cispo", "reinforce"]
    """What is made of ratio and advantage."""
    clip_low: float = Field(default=0.2, ge=0.0)
    """The ratio is clipped below 1 - clip_low."""
    clip_high: float = Field(default=0.28, ge=0.0)
    """The ratio is clipped above 1 + clip_high."""
    dual_clip: float | None = Field(default=None, gt=1.0)
    """Bound of the ratio for negative advantages; None: no bound."""
    correction: CorrectionConfig | None = None
    """An extra detached weight; None: none."""
    rejection: RejectionConfig | None = None
    """What leaves the loss because trainer and engine disagree on it; None: nothing."""
    aggregation: Literal["token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum"] = (
        "token_mean"
    )
    """How token losses become one number."""
    advantage: Literal["grpo", "dr_grpo"] = "grpo"
    """How a group's rewards become advantages."""
    kl: KLConfig | None = None
    """A penalty on leaving the reference policy; None: none."""
    perturbation: PerturbationConfig | None = None
    """ALP: take the numerator of the ratio from the perturbed policy; None: from the policy."""

    @property
    def needs_proximal(self) -> bool:
        """Whether an update needs the trainer's own logprobs from the start of the step."""
        corrected = self.correction is not None or self.rejection is not None
        return self.denominator == "proximal" or corrected

    @property
    def needs_reference(self) -> bool:
        """Whether an update needs the logprobs of the frozen initial policy."""
        return self.kl is not None


def _tis(level: Literal["token", "sequence"]) -> AlgorithmConfig:
    correction = CorrectionConfig(type="tis", level=level, high=2.0)
    return _GRPO.model_copy(update={"correction": correction})


def _mis(level: Literal["token", "sequence"]) -> AlgorithmConfig:
    correction = CorrectionConfig(type="mis", level=level, low=0.5, high=2.0)
    return _GRPO.model_copy(update={"correction": correction})


_GRPO = AlgorithmConfig(
    denominator="proximal", ratio_level="token", surrogate="clip", dual_clip=3.0
)


_BYPASS_TOKEN = AlgorithmConfig(
    denominator="rollout", ratio_level="token", surrogate="clip", dual_clip=10.0
)


_BYPASS_SEQUENCE = AlgorithmConfig(
    denominator="rollout",
    ratio_level="sequence",
    surrogate="clip",
    clip_low=0.5,
    clip_high=3.0,
    dual_clip=3.0,
)


_PRESETS: dict[str, AlgorithmConfig] = {
    "grpo": _GRPO,
    "dr_grpo": _GRPO.model_copy(
        update={"advantage": "dr_grpo", "aggregation": "sequence_mean_token_sum"}
    ),
    "dapo": _GRPO.model_copy(update={"dual_clip": None}),
    "gspo": AlgorithmConfig(
        denominator="proximal",
        ratio_level="sequence_geometric",
        surrogate="clip",
        clip_low=3e-4,
        clip_high=4e-4,
        aggregation="sequence_mean_token_mean",
    ),
    "bypass_token": _BYPASS_TOKEN,
    "bypass_sequence": _BYPASS_SEQUENCE,
    "tis_token": _tis("token"),
    "tis_sequence": _tis("sequence"),
    "mis_token": _mis("token"),
    "mis_sequence": _mis("sequence"),
    "icepop": _GRPO.model_copy(
        update={"correction": CorrectionConfig(type="icepop", low=0.5, high=5.0)}
    ),
    "cispo": _GRPO.model_copy(update={"surrogate": "cispo", "dual_clip": None}),
    "alp_token": _BYPASS_TOKEN.model_copy(update={"perturbation": PerturbationConfig()}),
    "alp_sequence": _BYPASS_SEQUENCE.model_copy(update={"perturbation": PerturbationConfig()}),
}


ALGORITHMS: MappingProxyType[str, AlgorithmConfig] = MappingProxyType(
    {name: preset.model_copy(update={"name": name}) for name, preset in _PRESETS.items()}
)
"""The presets: name -> method. ALP is its Bypass twin with a perturbed numerator."""


def resolve_algorithm(value: Any) -> Any:
    """Let a preset's name stand for the preset, and its keys override single values of it."""
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping) or "name" not in value or value["name"] == "custom":
        return value
    if value["name"] not in ALGORITHMS:
        raise ValueError(f"no algorithm {value['name']!r}; there are {', '.join(ALGORITHMS)}")
    return merge(ALGORITHMS[value["name"]].model_dump(), value)


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Lay one nested mapping over another: where both have a table, its keys are merged too."""
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        if isinstance(under, Mapping) and isinstance(value, Mapping):
            value = merge(under, value)
        merged[key] = value
    return merged
