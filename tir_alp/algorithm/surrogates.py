"""Surrogates: what loss does a token have, given its ratio and its advantage?

`SURROGATES` holds them. A new one is a function and an entry here; one that stands in a module of
your own is used as `surrogate = "my_module:NAME"`. Importing this module does not import torch, so
that the configuration can read the table quickly: tensors are only touched through their own
methods.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from tir_alp.algorithm.presets import AlgorithmConfig


SurrogateFunction = Callable[..., "tuple[Tensor, Mapping[str, Tensor]]"]
"""Computes the loss of each token, and which tokens are clipped; all tensors are [B, T].

It is called as `function(ratios, logprobs, advantages, algorithm, **reads)`. Outside the mask,
ratios are 1 and logprobs and advantages are 0.

Args:
    ratios: Ratio at the algorithm's level, between e^-20 and e^20.
    logprobs: Logprob of each token under the policy that is trained, in nats.
    advantages: Advantage of each token.
    algorithm: The method, whose settings the surrogate reads.
    reads: The fields of `LossInputs` that the entry names in `reads`; 0 outside the mask.

Returns:
    Token losses, and for each side a bool tensor that is True for the clipped tokens.
"""


@dataclass(frozen=True, slots=True)
class Surrogate:
    """An entry of `SURROGATES`."""

    function: SurrogateFunction
    formula: Callable[[AlgorithmConfig], str]
    """Writes L_t in terms of r_t and A."""
    sides: tuple[str, ...] = ()
    """Names of the sides on which the function may clip; each is logged by its name."""
    reads: tuple[str, ...] = ()
    """Fields of `LossInputs` that the function takes as keyword arguments."""
    options: Mapping[str, float] = field(default_factory=dict)
    """Settings of its own, name -> default; `AlgorithmConfig.options` overrides them."""
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


def _ratio(
    ratios: Tensor, logprobs: Tensor, advantages: Tensor, algorithm: AlgorithmConfig
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """-A r: importance sampling without any bound; what is too far off is left to a selection."""
    return -advantages * ratios, {}


# ------------------------------------------------------------ a trust region by divergence (DPPO)
#
# The distribution over the vocabulary is reduced to two events, this token or another one, so a
# divergence is a function of the two probabilities p (current) and q (denominator) of the token.


def binary_kl(logprobs: Tensor, others: Tensor) -> Tensor:
    """Return q log(q / p) + (1 - q) log((1 - q) / (1 - p)), where log p and log q are given.

    The probability of the other tokens is bounded from below by 1e-8.

    Args:
        logprobs: log p.
        others: log q, the distribution whose expectation it is.
    """
    p, q = logprobs.exp(), others.exp()
    rest_p, rest_q = (1 - p).clamp(min=1e-8), (1 - q).clamp(min=1e-8)
    return q * (others - logprobs) + rest_q * (rest_q / rest_p).log()


def _dppo(
    ratios: Tensor,
    logprobs: Tensor,
    advantages: Tensor,
    algorithm: AlgorithmConfig,
    divergence: Tensor,
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """-A sg[min(r, c)] log pi, without tokens that are too far off in the direction of A."""
    grows, shrinks = ratios.detach() > 1, ratios.detach() < 1
    clipped = {
        "high": (advantages > 0) & grows & (divergence > algorithm.clip_high),
        "low": (advantages < 0) & shrinks & (divergence > algorithm.clip_low),
    }
    weights = ratios.detach()
    if algorithm.dual_clip is not None:
        weights = weights.clamp(max=algorithm.dual_clip)
    kept = ~(clipped["high"] | clipped["low"])
    return -advantages * weights * logprobs * kept, clipped


def _dppo_tv(
    ratios: Tensor, logprobs: Tensor, advantages: Tensor, algorithm: AlgorithmConfig
) -> tuple[Tensor, Mapping[str, Tensor]]:
    p = logprobs.detach().exp()
    distance = (p - p / ratios.detach()).abs()
    return _dppo(ratios, logprobs, advantages, algorithm, distance)


def _dppo_kl(
    ratios: Tensor, logprobs: Tensor, advantages: Tensor, algorithm: AlgorithmConfig
) -> tuple[Tensor, Mapping[str, Tensor]]:
    log_p, log_r = logprobs.detach(), ratios.detach().log()
    return _dppo(ratios, logprobs, advantages, algorithm, binary_kl(log_p, log_p - log_r))


def _dppo_formula(divergence: str) -> Callable[[AlgorithmConfig], str]:
    def write(algorithm: AlgorithmConfig) -> str:
        c = algorithm.dual_clip
        weight = "r_t" if c is None else f"min(r_t, {c:g})"
        return (
            f"-sg[{weight}] A log pi(y_t), and 0 where A (r_t - 1) > 0 and {divergence} exceeds "
            f"{algorithm.clip_low:g} (A < 0) or {algorithm.clip_high:g} (A > 0)"
        )

    return write


# ------------------------------------------------------------------------- soft and other windows


def _sapo(
    ratios: Tensor, logprobs: Tensor, advantages: Tensor, algorithm: AlgorithmConfig
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """-A (4 / tau) sigmoid(tau (r - 1)): a soft gate, of slope 1 at r = 1."""
    gates = {
        name: (tau * (ratios - 1)).sigmoid() * (4 / tau)
        for name in ("tau_positive", "tau_negative")
        for tau in (algorithm.option(name),)
    }
    return -advantages * gates["tau_positive"].where(advantages > 0, gates["tau_negative"]), {}


def _sapo_formula(algorithm: AlgorithmConfig) -> str:
    positive, negative = (algorithm.option(f"tau_{sign}") for sign in ("positive", "negative"))
    return f"-A (4 / tau) sigmoid(tau (r_t - 1)), tau = {positive:g} where A > 0, else {negative:g}"


_LEAST_WEIGHT = 1e-8


def _vespo(
    ratios: Tensor, logprobs: Tensor, advantages: Tensor, algorithm: AlgorithmConfig
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """-sg[phi(r)] A log pi, phi(r) = r^k e^(lambda (1 - r)), k and lambda by the sign of A."""
    weights = ratios.detach().clamp(min=_LEAST_WEIGHT)
    factors = {
        sign: (k * weights.log() + bound * (1 - weights)).exp()
        for sign in ("positive", "negative")
        for k, bound in ((algorithm.option(f"k_{sign}"), algorithm.option(f"lambda_{sign}")),)
    }
    return -factors["positive"].where(
        advantages >= 0, factors["negative"]
    ) * advantages * logprobs, {}


def _vespo_formula(algorithm: AlgorithmConfig) -> str:
    by_sign = [
        f"k = {algorithm.option(f'k_{sign}'):g}, lambda = {algorithm.option(f'lambda_{sign}'):g}"
        for sign in ("positive", "negative")
    ]
    return (
        f"-sg[r_t^k e^(lambda (1 - r_t))] A log pi(y_t), {by_sign[0]} where A >= 0, "
        f"else {by_sign[1]}"
    )


def _gmpo(
    ratios: Tensor,
    logprobs: Tensor,
    advantages: Tensor,
    algorithm: AlgorithmConfig,
    *,
    loss_mask: Tensor,
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """-A exp(mean of the log ratios of the sequence, each clipped in the direction of A)."""
    log_ratios, sign = ratios.log(), advantages.sign()
    bounded = log_ratios.clamp(-algorithm.clip_low, algorithm.clip_high)
    chosen = sign * (sign * log_ratios).minimum(sign * bounded) * loss_mask
    lengths = loss_mask.sum(-1, keepdim=True).clamp(min=1)
    means = (chosen.sum(-1, keepdim=True) / lengths).exp()
    clipped = {
        "low": (advantages < 0) & (log_ratios < -algorithm.clip_low),
        "high": (advantages > 0) & (log_ratios > algorithm.clip_high),
    }
    return -advantages * means, clipped


def _gmpo_formula(algorithm: AlgorithmConfig) -> str:
    window = f"[-{algorithm.clip_low:g}, {algorithm.clip_high:g}]"
    return f"-A exp(mean_s of l_s, clipped to {window} where that lowers A l_s)"


def _kl_cov(
    ratios: Tensor,
    logprobs: Tensor,
    advantages: Tensor,
    algorithm: AlgorithmConfig,
    *,
    selected: Tensor,
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """-A r, and for the selected tokens + penalty |log r|."""
    penalty = algorithm.option("penalty") * ratios.log().abs()
    return -advantages * ratios + penalty * selected, {}


def _dppo_settings(name: str, bound: float) -> dict[str, Any]:
    return {
        "surrogate": name,
        "denominator": "rollout",
        "clip_low": bound,
        "clip_high": bound,
        "dual_clip": 20.0,
    }


_SAPO = {"surrogate": "sapo", "dual_clip": None, "aggregation": "sequence_mean_token_mean"}

SURROGATES: dict[str, Surrogate] = {
    "clip": Surrogate(_clip, _clip_formula, sides=("low", "high", "dual")),
    "cispo": Surrogate(
        _cispo,
        _cispo_formula,
        sides=("low", "high"),
        presets={"cispo": {"surrogate": "cispo", "dual_clip": None}},
    ),
    "reinforce": Surrogate(
        _reinforce,
        lambda _: "-A log pi(y_t)",
        presets={"reinforce": {"surrogate": "reinforce", "dual_clip": None}},
    ),
    "ratio": Surrogate(_ratio, lambda _: "-A r_t"),
    "dppo_tv": Surrogate(
        _dppo_tv,
        _dppo_formula("|pi(y_t) - q(y_t)|"),
        sides=("low", "high"),
        presets={"dppo_tv": _dppo_settings("dppo_tv", 0.15)},
    ),
    "dppo_kl": Surrogate(
        _dppo_kl,
        _dppo_formula("the binary KL(q, pi)"),
        sides=("low", "high"),
        presets={"dppo_kl": _dppo_settings("dppo_kl", 0.05)},
    ),
    "sapo": Surrogate(
        _sapo,
        _sapo_formula,
        options={"tau_positive": 1.0, "tau_negative": 1.05},
        presets={"sapo": _SAPO},
    ),
    "vespo": Surrogate(
        _vespo,
        _vespo_formula,
        options={
            "k_positive": 2.0,
            "lambda_positive": 3.0,
            "k_negative": 3.0,
            "lambda_negative": 2.0,
        },
        presets={
            "vespo": {
                "surrogate": "vespo",
                "denominator": "rollout",
                "ratio_level": "sequence",
                "dual_clip": None,
            }
        },
    ),
    "gmpo": Surrogate(
        _gmpo,
        _gmpo_formula,
        sides=("low", "high"),
        reads=("loss_mask",),
        presets={
            "gmpo": {
                "surrogate": "gmpo",
                "dual_clip": None,
                "clip_low": 0.4,
                "clip_high": 0.4,
                "aggregation": "sequence_mean_token_mean",
            }
        },
    ),
    "kl_cov": Surrogate(
        _kl_cov,
        lambda algorithm: f"-A r_t, + {algorithm.option('penalty'):g} |log r_t| if selected",
        reads=("selected",),
        options={"penalty": 1.0},
        presets={
            "kl_cov": {
                "surrogate": "kl_cov",
                "dual_clip": None,
                "selection": {"type": "top_covariance", "share": 2e-4},
            }
        },
    ),
}


def clip_sides() -> tuple[str, ...]:
    """Return every side on which a surrogate of the table may clip, without repetition."""
    return tuple(dict.fromkeys(side for each in SURROGATES.values() for side in each.sides))
