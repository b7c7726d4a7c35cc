"""Laws of the loss, over random shapes, masks and methods.

At the end are the formulas of docs/algorithm.md, one token at a time in numpy float64. They share
no code with the loss, and its value and gradient must equal theirs.
"""

import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tir_alp.algorithm.aggregations import AGGREGATIONS
from tir_alp.algorithm.corrections import CORRECTIONS
from tir_alp.algorithm.inputs import LossInputs
from tir_alp.algorithm.levels import RATIO_LEVELS
from tir_alp.algorithm.loss import KL_ESTIMATORS, loss_counts, loss_terms, policy_loss
from tir_alp.algorithm.presets import AlgorithmConfig, CorrectionConfig, KLConfig, RejectionConfig

torch.set_num_threads(1)
settings.register_profile("tir_alp", deadline=None)  # a busy machine is not a bug
settings.load_profile("tir_alp")

levels = st.sampled_from(sorted(RATIO_LEVELS))
corrections = st.builds(
    CorrectionConfig,
    type=st.sampled_from(sorted(CORRECTIONS)),
    level=levels,
    low=st.sampled_from([0.0, 0.8]),
    high=st.sampled_from([1.1, 5.0]),
    normalise=st.sampled_from(["all", "kept"]),
)
rejections = st.builds(
    RejectionConfig,
    level=levels,
    low=st.sampled_from([0.0, 0.8]),
    high=st.sampled_from([None, 1.3]),
    veto=st.sampled_from([0.0, 0.9]),
    normalise=st.sampled_from(["all", "kept"]),
)
kls = st.builds(
    KLConfig,
    estimator=st.sampled_from(sorted(KL_ESTIMATORS)),
    gradient=st.sampled_from(["estimator", "k2"]),
    coefficient=st.just(0.1),
)
algorithms = st.builds(
    AlgorithmConfig,
    denominator=st.sampled_from(["rollout", "proximal"]),
    ratio_level=levels,
    surrogate=st.sampled_from(["clip", "cispo", "reinforce"]),  # test_presets.py has the others
    clip_low=st.sampled_from([0.2, 0.5]),
    clip_high=st.sampled_from([0.1, 0.28]),
    dual_clip=st.sampled_from([None, 1.2]),
    correction=st.none() | corrections,
    rejection=st.none() | rejections,
    aggregation=st.sampled_from(sorted(AGGREGATIONS)),
    kl=st.none() | kls,
)


@st.composite
def batches(draw) -> LossInputs:
    """A random micro-batch of 1-5 sequences of up to 6 tokens; NaN or -inf in masked slots."""
    shape = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 20)))
    mask = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.3, 0.7, 1.0]))
    junk = draw(st.sampled_from([math.nan, -math.inf, math.inf]))

    def near(mean: torch.Tensor, std: float) -> torch.Tensor:
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        return torch.where(mask, mean + std * noise, junk)

    rollout = near(torch.full(shape, -1.0, dtype=torch.float64), 0.5)
    proximal = near(rollout, 0.2)
    turns = torch.randint(0, 2, shape, generator=generator).cumsum(-1).clamp(max=shape[1] - 1)
    return LossInputs(
        logprobs=near(proximal, 0.3),
        rollout_logprobs=rollout,
        advantages=torch.randn(shape[0], generator=generator, dtype=torch.float64),
        loss_mask=mask,
        proximal_logprobs=proximal,
        reference_logprobs=near(rollout, 0.3),
        turn_ids=torch.where(mask, turns, -1),
    )


def loss_and_gradient(inputs: LossInputs, algorithm: AlgorithmConfig, *counts):
    logprobs = inputs.logprobs.clone().requires_grad_()
    loss, metrics = policy_loss(replace(inputs, logprobs=logprobs), algorithm, *counts)
    loss.backward()
    assert logprobs.grad is not None
    return loss.detach(), logprobs.grad, metrics


def map_rows(inputs: LossInputs, change) -> LossInputs:
    values = {field.name: getattr(inputs, field.name) for field in fields(inputs)}
    return LossInputs(**{name: change(each) for name, each in values.items() if each is not None})


@given(batches(), algorithms)
def test_masked_tokens_have_no_gradient_and_no_influence(inputs, algorithm):
    loss, gradient, metrics = loss_and_gradient(inputs, algorithm)
    assert loss.isfinite() and gradient.isfinite().all()
    assert all(metric.isfinite() for metric in metrics.values())
    assert (gradient[~inputs.loss_mask] == 0).all()
    names = ("logprobs", "rollout_logprobs", "proximal_logprobs", "reference_logprobs")
    zeroed = {name: getattr(inputs, name).where(inputs.loss_mask, 0.0) for name in names}
    clean_loss, clean_gradient, _ = loss_and_gradient(replace(inputs, **zeroed), algorithm)
    assert torch.equal(loss, clean_loss) and torch.equal(gradient, clean_gradient)


@given(batches(), algorithms, st.integers(0, 5))
def test_micro_batches_add_up(inputs, algorithm, cut):
    whole_loss, whole_gradient, whole_metrics = loss_and_gradient(inputs, algorithm)
    parts = [map_rows(inputs, lambda x: x[:cut]), map_rows(inputs, lambda x: x[cut:])]
    parts = [part for part in parts if len(part.advantages)]
    counts = [
        sum(column) for column in zip(*(loss_counts(p, algorithm) for p in parts), strict=True)
    ]
    losses, gradients, metrics = zip(
        *(loss_and_gradient(part, algorithm, *counts) for part in parts), strict=True
    )
    torch.testing.assert_close(sum(losses), whole_loss)
    torch.testing.assert_close(torch.cat(gradients), whole_gradient)
    for key, metric in whole_metrics.items():
        torch.testing.assert_close(sum(m[key] for m in metrics), metric, msg=key)


@given(batches(), algorithms, st.integers(0, 1 << 20))
def test_order_and_padding_do_not_matter(inputs, algorithm, seed):
    loss, gradient, _ = loss_and_gradient(inputs, algorithm)
    order = torch.randperm(len(inputs.advantages), generator=torch.Generator().manual_seed(seed))

    def change(x: torch.Tensor) -> torch.Tensor:
        x = x[order]
        return x if x.dim() == 1 else torch.nn.functional.pad(x, (1, 2))

    other_loss, other_gradient, _ = loss_and_gradient(map_rows(inputs, change), algorithm)
    torch.testing.assert_close(other_loss, loss)
    torch.testing.assert_close(other_gradient[:, 1:-2], gradient[order])


@given(batches(), algorithms)
def test_advantages_may_differ_from_token_to_token(inputs, algorithm):
    wide = inputs.advantages[:, None].where(inputs.loss_mask, math.nan)
    expected = loss_and_gradient(inputs, algorithm)[:2]
    torch.testing.assert_close(
        loss_and_gradient(replace(inputs, advantages=wide), algorithm)[:2], expected
    )


@given(batches(), algorithms)
@settings(max_examples=300)
def test_loss_and_gradient_equal_the_formulas(inputs, algorithm):
    loss, gradient, _ = loss_and_gradient(inputs, algorithm)
    expected_loss, expected_gradient = by_the_formulas(inputs, algorithm)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-9, abs=1e-12)
    np.testing.assert_allclose(gradient.numpy(), expected_gradient, rtol=1e-9, atol=1e-12)


@given(batches(), algorithms)
def test_gradient_of_token_ratios_equals_finite_differences(inputs, algorithm):
    # Only where the gradient is that of the value: the other levels and a KL with the gradient of
    # k2 are straight-through, and CISPO's weight is detached. The formulas below cover those.
    kl = algorithm.kl and algorithm.kl.model_copy(update={"gradient": "estimator"})
    algorithm = algorithm.model_copy(update={"ratio_level": "token", "kl": kl})
    if algorithm.surrogate == "cispo":
        algorithm = algorithm.model_copy(update={"surrogate": "reinforce"})
    _, gradient, _ = loss_and_gradient(inputs, algorithm)
    step = 1e-6
    for row, column in inputs.loss_mask.nonzero().tolist()[:4]:
        shift = torch.zeros_like(inputs.logprobs)
        shift[row, column] = step
        sides = [
            policy_loss(replace(inputs, logprobs=inputs.logprobs + s), algorithm)[0].item()
            for s in (shift, -shift)
        ]
        assert gradient[row, column].item() == pytest.approx(
            (sides[0] - sides[1]) / (2 * step), rel=1e-5, abs=1e-7
        )


# ------------------------------------------------------------------------ identities of methods


def same(one, other) -> bool:
    """Whether losses and gradients are equal, bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(one[:2], other[:2], strict=True))


def changed(algorithm: AlgorithmConfig, **changes) -> AlgorithmConfig:
    return algorithm.model_copy(update=changes)


plain = algorithms.map(lambda each: changed(each, correction=None, rejection=None))


@given(batches(), plain, levels)
def test_truncation_without_a_bound_on_an_exact_engine_changes_nothing(inputs, algorithm, level):
    exact = replace(inputs, rollout_logprobs=inputs.proximal_logprobs)
    tis = changed(algorithm, correction=CorrectionConfig(type="tis", level=level, high=1e30))
    assert same(loss_and_gradient(exact, tis), loss_and_gradient(exact, algorithm))


@given(batches(), algorithms, levels, st.sampled_from(["all", "kept"]))
def test_icepop_is_mis_and_truncation_with_a_rejection_window(inputs, algorithm, level, normalise):
    window = {"level": level, "low": 0.8, "high": 1.2, "normalise": normalise}
    icepop, mis = (
        changed(algorithm, correction=CorrectionConfig(type=name, **window), rejection=None)
        for name in ("icepop", "mis")
    )
    tis = CorrectionConfig(type="tis", level=level, high=1.2)
    split = changed(algorithm, correction=tis, rejection=RejectionConfig(**window))
    expected = loss_and_gradient(inputs, icepop)
    assert same(loss_and_gradient(inputs, mis), expected)
    assert same(loss_and_gradient(inputs, split), expected)


@given(batches(), plain)
def test_bypass_is_grpo_with_the_rollout_policy_as_proximal(inputs, algorithm):
    grpo, bypass = (changed(algorithm, denominator=name) for name in ("proximal", "rollout"))
    as_proximal = replace(inputs, proximal_logprobs=inputs.rollout_logprobs)
    assert same(loss_and_gradient(as_proximal, grpo), loss_and_gradient(inputs, bypass))


@given(batches(), algorithms, levels, levels)
def test_all_levels_agree_on_sequences_of_one_token(inputs, algorithm, level, other):
    first = inputs.loss_mask.cumsum(-1) == 1
    inputs = replace(inputs, loss_mask=inputs.loss_mask & first)
    both = (
        loss_and_gradient(inputs, changed(algorithm, ratio_level=each)) for each in (level, other)
    )
    for one, two in zip(*both, strict=True):
        torch.testing.assert_close(one, two)


@given(batches(), algorithms)
def test_an_open_window_rejects_nothing(inputs, algorithm):
    none, opened = (
        changed(algorithm, rejection=each) for each in (None, RejectionConfig(level="sequence"))
    )
    assert same(loss_and_gradient(inputs, none), loss_and_gradient(inputs, opened))


@given(batches(), plain)
def test_clip_fractions_are_the_share_of_the_clipped_tokens(inputs, algorithm):
    terms = loss_terms(inputs, algorithm)
    for side, where in terms.clipped.items():
        share = where.sum() / inputs.loss_mask.sum().clamp(min=1)
        torch.testing.assert_close(terms.metrics[f"loss/clip_fraction_{side}"].float(), share)
        assert not (where & ~inputs.loss_mask).any()


# --------------------------------------------------------------- the formulas, one token at a time


def by_the_formulas(inputs: LossInputs, algorithm: AlgorithmConfig) -> tuple[float, np.ndarray]:
    """Return the loss and its gradient [B, T] with respect to the current logprobs."""
    current, rollout, proximal, reference = (
        tensor.numpy().astype(np.float64)
        for tensor in (
            inputs.logprobs,
            inputs.rollout_logprobs,
            inputs.proximal_logprobs,
            inputs.reference_logprobs,
        )
        if tensor is not None
    )
    mask, turns = inputs.loss_mask.numpy(), inputs.turn_ids.numpy()  # type: ignore[union-attr]
    below = rollout if algorithm.denominator == "rollout" else proximal
    losses, slopes, counted = np.zeros(mask.shape), np.zeros(mask.shape), mask.copy()
    for b, t in np.argwhere(mask):
        tokens = np.flatnonzero(mask[b])

        def ratio(name, above, under, b=b, t=t, tokens=tokens) -> float:
            among = {
                "token": [t],
                "sequence": tokens,
                "turn": [s for s in tokens if turns[b, s] == turns[b, t]],
                "cumulative": [s for s in tokens if s <= t],
            }[name.removesuffix("_geometric")]
            terms = [above[b, s] - under[b, s] for s in among]
            return math.exp(sum(terms) / (len(terms) if name.endswith("_geometric") else 1))

        advantage, logprob = inputs.advantages[b].item(), float(current[b, t])
        loss, slope = surrogate(
            ratio(algorithm.ratio_level, current, below), advantage, logprob, algorithm
        )
        weight = 1.0
        if (how := algorithm.correction) is not None:
            weight = ratio(how.level, proximal, rollout)
            high = math.inf if how.high is None else how.high
            if how.type == "tis":
                weight = min(max(weight, how.low), high)
            elif not how.low <= weight <= high:
                weight = 0.0
                counted[b, t] &= how.normalise == "all"
        if (how := algorithm.rejection) is not None:
            level_ratio = ratio(how.level, proximal, rollout)
            lowest = min(math.exp(proximal[b, s] - rollout[b, s]) for s in tokens)
            too_high = how.high is not None and level_ratio > how.high
            if level_ratio < how.low or too_high or lowest < how.veto:
                weight = 0.0
                counted[b, t] &= how.normalise == "all"
        if not counted[b, t]:
            continue
        losses[b, t], slopes[b, t] = weight * loss, weight * slope
        if (kl := algorithm.kl) is not None:
            d = reference[b, t] - logprob
            value = {"k1": -d, "k2": d * d / 2, "k3": math.exp(d) - d - 1}[kl.estimator]
            own = {"k1": 1.0, "k2": -d, "k3": 1 - math.exp(d)}[kl.estimator]
            losses[b, t] += kl.coefficient * value
            slopes[b, t] += kl.coefficient * (own if kl.gradient == "estimator" else -d)
    lengths = counted.sum(1)
    share = np.zeros(mask.shape)  # weight of each token in the mean
    for b, t in np.argwhere(counted):
        share[b, t] = {
            "token_mean": 1 / lengths.sum(),
            "sequence_mean_token_mean": 1 / (lengths[b] * (lengths > 0).sum()),
            "sequence_mean_token_sum": 1 / (lengths > 0).sum(),
        }[algorithm.aggregation]
    return float((share * losses).sum()), share * slopes


def surrogate(
    r: float, advantage: float, logprob: float, algorithm: AlgorithmConfig
) -> tuple[float, float]:
    """Return the loss of a token and its derivative by the logprob, where dr / dlogprob = r."""
    low, high = 1 - algorithm.clip_low, 1 + algorithm.clip_high
    if algorithm.surrogate == "reinforce":
        return -advantage * logprob, -advantage
    bounded = min(max(r, low), high)
    if algorithm.surrogate == "cispo":
        return -bounded * advantage * logprob, -bounded * advantage
    loss = max(-advantage * r, -advantage * bounded)
    is_active = r <= high if advantage > 0 else r >= low
    if advantage < 0 and algorithm.dual_clip is not None:
        loss = min(loss, -advantage * algorithm.dual_clip)
        is_active = is_active and r <= algorithm.dual_clip
    return loss, -advantage * r if is_active else 0.0
