"""Every preset once more: numpy, float64, one token at a time, and no code of the package.

The loss is a function of two arrays of current logprobs: `live`, which carry the gradient, and
`fixed`, which stand wherever a formula stops it. At `live = fixed` its value is the loss, and its
derivative by `live` is the gradient.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass
class Case:
    """A batch: [B, T] arrays, and the masks as bools."""

    rollout: np.ndarray
    proximal: np.ndarray
    reference: np.ndarray
    advantages: np.ndarray
    mask: np.ndarray
    turns: np.ndarray
    selected: np.ndarray
    entropy: np.ndarray


def among(level: str, case: Case, b: int, t: int) -> list[int]:
    tokens = [int(s) for s in np.flatnonzero(case.mask[b])]
    return {
        "token": [t],
        "sequence": tokens,
        "turn": [s for s in tokens if case.turns[b, s] == case.turns[b, t]],
        "cumulative": [s for s in tokens if s <= t],
    }[level.removesuffix("_geometric")]


def at(level: str, values: np.ndarray, case: Case, b: int, t: int) -> float:
    found = [values[b, s] for s in among(level, case, b, t)]
    return sum(found) / (len(found) if level.endswith("_geometric") else 1)


def bernoulli_kl(p: float, q: float) -> float:
    """KL(p, q) of two coins."""
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def surrogate(
    algorithm: Any,
    r: float,
    r_fixed: float,
    x: float,
    x_fixed: float,
    a: float,
    chosen: bool,
) -> float:
    """Loss of one token with the advantage a; r at the level of the method."""
    low, high = 1 - algorithm.clip_low, 1 + algorithm.clip_high
    options = {"tau_positive": 1.0, "tau_negative": 1.05, "k_positive": 2.0, "k_negative": 3.0}
    options |= {"lambda_positive": 3.0, "lambda_negative": 2.0, "penalty": 1.0, **algorithm.options}
    sign = "positive" if a > 0 else "negative"
    match algorithm.surrogate:
        case "clip":
            loss = max(-a * r, -a * min(max(r, low), high))
            if a < 0 and algorithm.dual_clip is not None:
                loss = min(loss, -a * algorithm.dual_clip)
            return loss
        case "ratio":
            return -a * r
        case "reinforce":
            return -a * x
        case "cispo":
            return -min(max(r_fixed, low), high) * a * x
        case "sapo":
            tau = options[f"tau_{sign}"]
            return -a * 4 / tau / (1 + math.exp(-tau * (r - 1)))
        case "vespo":
            sign = "positive" if a >= 0 else "negative"
            k, scale = options[f"k_{sign}"], options[f"lambda_{sign}"]
            return -(r_fixed**k) * math.exp(scale - scale * r_fixed) * a * x
        case "kl_cov":
            return -a * r + (options["penalty"] * abs(math.log(r)) if chosen else 0.0)
        case "dppo_tv" | "dppo_kl" as name:
            p = math.exp(x_fixed)
            q = p / r_fixed
            distance = abs(p - q) if name == "dppo_tv" else bernoulli_kl(q, p)
            outwards = (a > 0 and p > q) or (a < 0 and p < q)
            bound = algorithm.clip_high if a > 0 else algorithm.clip_low
            weight = min(r_fixed, algorithm.dual_clip)
            return 0.0 if outwards and distance > bound else -a * weight * x
    raise AssertionError(algorithm.surrogate)


def gmpo(algorithm: Any, log_ratios: np.ndarray, case: Case, b: int, t: int) -> float:
    tokens = among("sequence", case, b, t)
    total = 0.0
    for s in tokens:
        value, a = log_ratios[b, s], case.advantages[b, s]
        if a > 0:
            value = min(value, algorithm.clip_high)
        elif a < 0:
            value = max(value, -algorithm.clip_low)
        total += value if a else 0.0
    return -case.advantages[b, t] * math.exp(total / len(tokens))


def measured(how: Any, above: np.ndarray, case: Case, b: int, t: int) -> float:
    """Return what a rejection bounds, at a token."""
    p, q = above, case.rollout
    if how.measure == "ratio":
        if how.level == "sequence_max":
            return max(math.exp(p[b, s] - q[b, s]) for s in among("sequence", case, b, t))
        return math.exp(at(how.level, p - q, case, b, t))
    each = np.zeros(case.mask.shape)
    for row, column in np.argwhere(case.mask):
        x, y = p[row, column], q[row, column]
        each[row, column] = {
            "k1": y - x,
            "k2": (x - y) ** 2 / 2,
            "k3": math.exp(x - y) - (x - y) - 1,
            "binary_kl": max(
                bernoulli_kl(math.exp(x), math.exp(y)), bernoulli_kl(math.exp(y), math.exp(x))
            ),
            "binary_tv": abs(math.exp(x) - math.exp(y)),
        }[how.measure]
    if how.level == "sequence_max":
        return max(each[b, s] for s in among("sequence", case, b, t))
    return at(how.level, each, case, b, t)


def rejections_of(how: Any) -> list[Any]:
    return [] if how is None else [how, *how.also]


EFFECTS = {"top_entropy": "keep", "second_moment": "keep", "random_covariance": "drop"}


def loss(algorithm: Any, case: Case, live: np.ndarray, fixed: np.ndarray) -> float:
    proximal = case.proximal
    below = case.rollout if algorithm.denominator == "rollout" else proximal
    weights, counted = np.ones(case.mask.shape), case.mask.copy()
    for b, t in np.argwhere(case.mask):
        if (how := algorithm.correction) is not None:
            weight = math.exp(at(how.level, proximal - case.rollout, case, b, t))
            high = math.inf if how.high is None else how.high
            if how.type == "tis":
                weight = min(max(weight, how.low), high)
            elif not how.low <= weight <= high:
                weight = 0.0
                counted[b, t] &= how.normalise == "all"
            weights[b, t] = weight
        for how in rejections_of(algorithm.rejection):
            above = fixed if how.numerator == "current" else proximal
            value = measured(how, above, case, b, t)
            low = -math.inf if how.measure == "k1" else how.low
            outside = value < low or (how.high is not None and value > how.high)
            lowest = min(
                math.exp(above[b, s] - case.rollout[b, s]) for s in among("sequence", case, b, t)
            )
            if how.only_negative and case.advantages[b, t] >= 0:
                continue
            if outside or lowest < how.veto:
                weights[b, t] = 0.0
                counted[b, t] &= how.normalise == "all"
    number = max(1, counted.sum())
    if algorithm.correction is not None and algorithm.correction.mean_one:
        weights = weights * number / weights[counted].sum()
    lengths, rows = counted.sum(1), (counted.sum(1) > 0).sum()
    total = 0.0
    for b, t in np.argwhere(counted):
        x, x_fixed, chosen = float(live[b, t]), float(fixed[b, t]), bool(case.selected[b, t])
        level = at(algorithm.ratio_level, fixed - below, case, b, t)
        r = math.exp(level + x - x_fixed)
        if algorithm.surrogate == "gmpo":
            value = gmpo(algorithm, live - below, case, b, t)
        else:
            a = float(case.advantages[b, t])
            value = surrogate(algorithm, r, math.exp(level), x, x_fixed, a, chosen)
        if algorithm.selection is not None:
            effect = EFFECTS.get(algorithm.selection.type, "mark")
            value *= {"keep": chosen, "drop": not chosen, "mark": True}[effect]
        value *= weights[b, t]
        if (kl := algorithm.kl) is not None:
            d = case.reference[b, t] - x
            term = {"k1": -d, "k2": d * d / 2, "k3": math.exp(d) - d - 1}[kl.estimator]
            value += (
                kl.coefficient * term * (math.exp(x - below[b, t]) if kl.weight == "ratio" else 1.0)
            )
        total += (
            value
            * {
                "token_mean": 1 / number,
                "sequence_mean_token_mean": 1 / (lengths[b] * rows),
                "sequence_mean_token_sum": 1 / rows,
            }[algorithm.aggregation]
        )
    return total - algorithm.entropy_bonus * case.entropy[counted].sum() / number
