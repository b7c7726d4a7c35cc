"""What a method is made of, typed: `ALGORITHMS` holds one `AlgorithmConfig` per method.

Two methods differ in these values and in nothing else. Importing this module does not import torch,
so that an error in a configuration is reported quickly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field, model_validator

from tir_alp.algorithm.advantage import ADVANTAGES, Advantage
from tir_alp.algorithm.corrections import CORRECTIONS, Correction
from tir_alp.algorithm.lookup import find, find_outside, no_such
from tir_alp.algorithm.rejections import each_of
from tir_alp.algorithm.section import Section, merge
from tir_alp.algorithm.selections import SELECTIONS, Selection
from tir_alp.algorithm.surrogates import SURROGATES, Surrogate

T = TypeVar("T")


def _entry_of(table: Mapping[str, T], kind: type[T]) -> Callable[[str], str]:
    """Return a validator for names of entries of a table, or outside of it: see `lookup.find`."""

    def check(name: str) -> str:
        find(name, table, kind)
        return name

    return check


class PerturbationConfig(Section):
    """The noise of ALP on the hidden state that enters a decoder layer."""

    init_std: float = Field(default=0.01, ge=0.0)
    """Standard deviation of the noise before training; 0 switches it off exactly."""
    layers: tuple[int, int] | None = None
    """Half-open range [start, stop) of the decoder layers that get noise; None: all layers."""
    learnable: bool = True
    """Whether each layer's sigma is trained."""
    scale: Literal["absolute", "relative"] = "absolute"
    """Unit of sigma: that of the hidden state, or the root mean square of each token's state."""
    site: Literal["hidden", "logits"] = "hidden"
    """Where the noise is added: to what enters the decoder layers, or, as an ablation, to the
    logits alone."""
    draws: int = Field(default=1, ge=1)
    """Independent draws of the noise per update. Their losses are averaged; each draw costs a
    forward and a backward pass."""
    antithetic: bool = False
    """Whether every second draw is the negative of the one before it."""
    seed: int = 0
    """Seed of every noise stream; a run adds its own seed."""

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
"""The tokens over which a log ratio is summed (`_geometric`: averaged); see `RATIO_LEVELS`."""


class CorrectionConfig(Section):
    """A detached weight on the loss against the mismatch of trainer and engine."""

    type: Annotated[str, AfterValidator(_entry_of(CORRECTIONS, Correction))]
    """`tis` truncates the weight to [low, high]; `mis` and `icepop` reject it outside;
    `module:NAME` is a `Correction` of your own."""
    level: Level = "token"
    """Level of the ratio of the proximal over the rollout policy."""
    low: float = Field(default=0.0, ge=0.0)
    """Weights below it are raised to it (`tis`) or rejected (`mis`, `icepop`); 0: no bound."""
    high: float | None = Field(default=2.0, gt=0.0)
    """Weights above it are lowered to it (`tis`) or rejected (`mis`, `icepop`); None: no bound."""
    mean_one: bool = False
    """Divide the weights by their mean over the tokens of the update."""
    normalise: Literal["all", "kept"] = "all"
    """Whether rejected tokens still count in the loss's denominator."""

    @model_validator(mode="after")
    def _check_window(self) -> CorrectionConfig:
        return _with_window(self)


class CriterionConfig(Section):
    """Which tokens a rejection takes out of the loss."""

    measure: Literal["ratio", "k1", "k2", "k3", "binary_kl", "binary_tv"] = "ratio"
    """What `low` and `high` bound, with p of the numerator and q of the rollout policy: p / q; an
    estimate of KL(q, p); or a divergence of the distributions over this token and all others."""
    numerator: Literal["proximal", "current"] = "proximal"
    """Policy that is compared with the rollout policy; `current` needs no proximal logprobs, and is
    compared anew in every update."""
    level: Level | Literal["sequence_max"] = "token"
    """Tokens over which the measure is summed (`_geometric`: averaged; for a ratio, its logarithm
    is), or of which the largest value counts."""
    low: float = Field(default=0.0, ge=0.0)
    """Tokens with a lower value are rejected; 0: no bound."""
    high: float | None = Field(default=None, gt=0.0)
    """Tokens with a higher value are rejected; None: no upper bound."""
    veto: float = Field(default=0.0, ge=0.0, lt=1.0)
    """A token whose own ratio is lower rejects its whole sequence, whatever the level; 0: off."""
    only_negative: bool = False
    """Whether only tokens with a negative advantage are rejected."""
    normalise: Literal["all", "kept"] = "kept"
    """Whether rejected tokens still count in the loss's denominator."""

    @model_validator(mode="after")
    def _check_window(self) -> CriterionConfig:
        if self.numerator == "current" and self.normalise != "all":
            raise ValueError(
                'numerator = "current" needs normalise = "all": which tokens stay is not known '
                "before the forward of an update"
            )
        if self.measure == "k1" and self.low:
            raise ValueError(f"the measure k1 has no lower bound, but low is {self.low}")
        return _with_window(self)


class RejectionConfig(CriterionConfig):
    """Takes tokens on which two policies disagree out of the loss.

    The other tokens keep their weight.
    """

    also: tuple[CriterionConfig, ...] = ()
    """Further criteria: a token stays if every one keeps it."""


Window = TypeVar("Window", CorrectionConfig, CriterionConfig)


def _with_window(config: Window) -> Window:
    """Return a config. Raises ValueError if nothing is between its bounds."""
    if config.high is not None and config.low > config.high:
        raise ValueError(f"low ({config.low}) is above high ({config.high})")
    return config


class SelectionConfig(Section):
    """Tokens that are chosen among all those of an update, by what the proximal policy says."""

    type: Annotated[str, AfterValidator(_entry_of(SELECTIONS, Selection))]
    """`top_entropy`, `second_moment`, `top_covariance` and `random_covariance`; `module:NAME` is a
    `Selection` of your own."""
    share: float = Field(default=0.2, gt=0.0, le=1.0)
    """Share of the tokens that is selected, for those that select a share."""
    low: float = 0.0
    """Lower bound of the window of `random_covariance`."""
    high: float = 1.0
    """Its upper bound; for `second_moment`, the bound of the mean square."""


class KLConfig(Section):
    """A penalty on the distance to the reference policy."""

    estimator: Literal["k1", "k2", "k3"] = "k3"
    """With d = reference - current logprob: k1 = -d, k2 = d^2 / 2, k3 = e^d - d - 1."""
    gradient: Literal["estimator", "k2"] = "estimator"
    """The estimator whose gradient is used: the one above, or k2, whose gradient is on average that
    of the distance itself."""
    weight: Literal["none", "ratio"] = "none"
    """`ratio` multiplies the term by the token ratio of the current policy over the denominator,
    with its gradient, which makes the estimate unbiased for samples of the denominator."""
    coefficient: float = Field(default=0.001, ge=0.0)
    """Weight of the term in the loss."""


class AcceptanceConfig(Section):
    """Whether the updates of a step stay, once the engine has sampled with their weights."""

    tolerance: float = Field(default=1e-3, ge=0.0)
    """How far the estimated gap between the engine's and the trainer's expected reward, in units of
    the advantage, may be below 0 in the first step. If it is lower, the step makes no update, and
    those of the step before are undone."""
    last_tolerance: float = Field(default=0.0, ge=0.0)
    """The same after `tolerance_steps`."""
    tolerance_steps: int = Field(default=100, ge=1)
    """Number of steps over which the tolerance changes, linearly."""


class AlgorithmConfig(Section):
    """One policy-gradient method, as the choices that define it."""

    name: str = "custom"
    """Name of the preset it comes from, for reports; `module:NAME` is an `AlgorithmConfig` of your
    own."""
    denominator: Literal["rollout", "proximal"]
    """Policy in the denominator of the ratio: the engine's, or the trainer's at the start of a
    step."""
    proximal: Literal["current", "rollout_version", "interpolated"] = "current"
    """Weights of the proximal policy: those at the start of the step; for each token those of the
    version that sampled it; or, without a forward, an interpolation of logprobs, in which a token
    that is d steps old has the share d / (d + 1) of the current policy and the rest of the rollout
    policy."""
    ratio_level: Level
    """The tokens over which the log ratio is summed (`_geometric`: averaged)."""
    surrogate: Annotated[str, AfterValidator(_entry_of(SURROGATES, Surrogate))]
    """The loss of a token, given ratio and advantage: an entry of docs/algorithm.md, or
    `module:NAME`, a `Surrogate` of your own."""
    options: dict[str, float] = Field(default_factory=dict)
    """Settings of the surrogate that it has alone, such as `tau_positive` of `sapo`."""
    clip_low: float = Field(default=0.2, ge=0.0)
    """Ratios below 1 - clip_low are clipped; `gmpo` bounds log ratios, `dppo_*` a divergence."""
    clip_high: float = Field(default=0.28, ge=0.0)
    """Ratios above 1 + clip_high are clipped; likewise."""
    dual_clip: float | None = Field(default=None, gt=1.0)
    """Upper bound of the ratio where the advantage is negative (`dppo_*`: of its weight); None: no
    bound."""
    correction: CorrectionConfig | None = None
    """An additional detached weight against mismatch; None: no weight."""
    rejection: RejectionConfig | None = None
    """Tokens that leave the loss because trainer and engine disagree on them; None: no token."""
    selection: SelectionConfig | None = None
    """Tokens of an update that have a gradient alone, have none, or are treated in another way;
    None: none."""
    entropy_bonus: float = Field(default=0.0, ge=0.0)
    """Coefficient of the mean entropy over tokens, which is subtracted from the loss."""
    aggregation: Literal["token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum"] = (
        "token_mean"
    )
    """How the losses of tokens become one number."""
    advantage: Annotated[str, AfterValidator(_entry_of(ADVANTAGES, Advantage))] = "grpo"
    """How rewards become advantages: an entry of docs/algorithm.md, or `module:NAME`, an
    `Advantage` of your own."""
    step_scale: Literal["none", "ess"] = "none"
    """What the learning rate of an update is multiplied by: nothing, or the square root of the
    effective sample size of its sequences' ratios, current over rollout policy."""
    acceptance: AcceptanceConfig | None = None
    """Undo updates that the engine's policy has not gained from; None: all updates stay. It needs
    `rollout.max_staleness = 0` and a method with proximal logprobs."""
    kl: KLConfig | None = None
    """A penalty on the distance to the reference policy; None: no penalty."""
    perturbation: PerturbationConfig | None = None
    """ALP: the numerator of the ratio comes from the perturbed policy; None: from the policy."""

    @model_validator(mode="after")
    def _check_options(self) -> AlgorithmConfig:
        known = find(self.surrogate, SURROGATES, Surrogate).options
        if unknown := [name for name in self.options if name not in known]:
            raise ValueError(
                no_such(f"option of the surrogate {self.surrogate!r}", unknown[0], known)
            )
        reads = find(self.surrogate, SURROGATES, Surrogate).reads
        if "selected" in reads and self.selection is None:
            raise ValueError(f"the surrogate {self.surrogate!r} needs a selection")
        if self.proximal == "interpolated":
            self._check_interpolated()
        if self.acceptance is not None and not (self.needs_proximal and self.proximal == "current"):
            raise ValueError(
                "acceptance compares the proximal with the rollout policy: it needs a method that "
                'reads proximal logprobs, such as one with a correction, and proximal = "current"'
            )
        return self

    def _check_interpolated(self) -> None:
        """Raise ValueError for what has to know proximal logprobs before an update's forward."""
        rejections = [] if self.rejection is None else [*each_of(self.rejection)]
        reasons = {
            "a selection": self.selection is not None,
            "a baseline of tokens": self._has_token_baseline,
            "correction.mean_one": self.correction is not None and self.correction.mean_one,
            'normalise = "kept"': any(
                each.normalise == "kept"
                for each in (self.correction, *rejections)
                if each is not None
            ),
        }
        if found := [name for name, is_used in reasons.items() if is_used]:
            raise ValueError(
                f'proximal = "interpolated" has no logprobs before the forward of an update, which '
                f"{found[0]} needs"
            )

    @property
    def _has_token_baseline(self) -> bool:
        return find(self.advantage, ADVANTAGES, Advantage).token_baseline != "none"

    def option(self, name: str) -> float:
        """Return a setting that the surrogate has alone."""
        default = find(self.surrogate, SURROGATES, Surrogate).options[name]
        return self.options.get(name, default)

    @property
    def needs_proximal(self) -> bool:
        """Whether a step needs a forward of the proximal policy before its updates."""
        if self.proximal == "interpolated":
            return False
        rejections = [] if self.rejection is None else [*each_of(self.rejection)]
        compared = any(each.numerator == "proximal" for each in rejections)
        corrected = self.correction is not None or self.selection is not None or compared
        return self.denominator == "proximal" or corrected or self._has_token_baseline

    @property
    def needs_reference(self) -> bool:
        """Whether an update needs logprobs under the frozen initial policy."""
        return self.kl is not None


_GRPO = AlgorithmConfig(
    denominator="proximal", ratio_level="token", surrogate="clip", dual_clip=3.0
)
_GSPO = AlgorithmConfig(
    denominator="proximal",
    ratio_level="sequence_geometric",
    surrogate="clip",
    clip_low=3e-4,
    clip_high=4e-4,
    aggregation="sequence_mean_token_mean",
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


_OFF_POLICY = RejectionConfig(
    measure="k1",
    numerator="current",
    level="sequence_geometric",
    high=0.5,
    only_negative=True,
    normalise="all",
)


def make_presets() -> dict[str, AlgorithmConfig]:
    """Return the presets by name: those of this file, and those that entries of the tables bring.

    ALP is its Bypass twin with a perturbed numerator.
    """
    noise = {"perturbation": PerturbationConfig()}
    presets = {
        "grpo": _GRPO,
        **_brought_by(ADVANTAGES.values()),
        "dapo": _GRPO.model_copy(update={"dual_clip": None}),
        **_brought_by(SURROGATES.values()),
        "gspo": _GSPO,
        "luspo": _GSPO.model_copy(
            update={
                "clip_low": 2e-3,
                "clip_high": 2.5e-3,
                "aggregation": "sequence_mean_token_sum",
            }
        ),
        "tbpo": _GSPO.model_copy(
            update={
                "dual_clip": 1.0007,
                "correction": CorrectionConfig(type="tis", level="sequence_geometric"),
            }
        ),
        **_brought_by(SELECTIONS.values()),
        **_brought_by(CORRECTIONS.values()),
        "bypass_token": _BYPASS_TOKEN,
        "bypass_sequence": _BYPASS_SEQUENCE,
        "off_policy_mask": _GRPO.model_copy(update={"rejection": _OFF_POLICY}),
        "tis_same_version": _GRPO.model_copy(
            update={"correction": CorrectionConfig(type="tis"), "proximal": "rollout_version"}
        ),
        "a3po": _GRPO.model_copy(
            update={"correction": CorrectionConfig(type="tis"), "proximal": "interpolated"}
        ),
        "vcpo_step": _GRPO.model_copy(
            update={
                "correction": CorrectionConfig(type="tis", level="sequence"),
                "step_scale": "ess",
            }
        ),
        "mipu": _GRPO.model_copy(
            update={
                "correction": CorrectionConfig(type="tis"),
                "aggregation": "sequence_mean_token_mean",
                "acceptance": AcceptanceConfig(),
            }
        ),
        "unbiased_kl": _GRPO.model_copy(update={"kl": KLConfig(weight="ratio")}),
        "entropy_bonus": _GRPO.model_copy(update={"entropy_bonus": 0.001}),
        "alp_token": _BYPASS_TOKEN.model_copy(update=noise),
        "alp_sequence": _BYPASS_SEQUENCE.model_copy(update=noise),
    }
    return {name: preset.model_copy(update={"name": name}) for name, preset in presets.items()}


def _brought_by(
    entries: Iterable[Surrogate | Selection | Correction | Advantage],
) -> dict[str, AlgorithmConfig]:
    """Return the presets that entries of a table bring, as variants of GRPO."""
    return {
        name: AlgorithmConfig.model_validate(merge(_GRPO.model_dump(), changes))
        for entry in entries
        for name, changes in entry.presets.items()
    }


ALGORITHMS: MappingProxyType[str, AlgorithmConfig] = MappingProxyType(make_presets())
"""The presets: name -> method."""


NEGATIVE_LOG_LIKELIHOOD = AlgorithmConfig(
    denominator="rollout", ratio_level="token", surrogate="reinforce"
)
"""Supervised learning as a method: with the advantage 1, `reinforce` is -log pi per token."""


def resolve_algorithm(value: Any) -> Any:
    """Replace a preset's name by the preset, with the other keys of `value` laid over it.

    The name is a key of `ALGORITHMS`, or `module:NAME`, an `AlgorithmConfig` in an importable
    module.

    Raises:
        ValueError: If there is no such preset.
    """
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping):
        return value
    if value.get("name", "custom") == "custom":
        demanded = ("denominator", "ratio_level", "surrogate")
        if missing := [key for key in demanded if key not in value]:
            raise ValueError(
                f"there is no {missing[0]}: name the preset that the other values change, as "
                f'name = "alp_sequence", or give all of {", ".join(demanded)}'
            )
        return value
    name = str(value["name"])
    if ":" in name:
        preset = find_outside(name, AlgorithmConfig)
    elif name in ALGORITHMS:
        preset = ALGORITHMS[name]
    else:
        raise ValueError(no_such("algorithm", name, ALGORITHMS))
    return merge(preset.model_dump(), value)
