"""Laws of the loss, over random shapes, masks and methods; and against a version made of loops."""

import math
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tir_alp.config import AlgorithmConfig, CorrectionConfig, KLConfig
from tir_alp.loss import (
    AGGREGATIONS,
    CORRECTIONS,
    KL_ESTIMATORS,
    RATIO_LEVELS,
    SURROGATES,
    LossInputs,
    loss_counts,
    policy_loss,
)

torch.set_num_threads(1)
settings.register_profile("tir_alp", deadline=None)  # a busy machine is not a bug
settings.load_profile("tir_alp")

corrections = st.builds(
    CorrectionConfig,
    type=st.sampled_from(sorted(CORRECTIONS)),
    level=st.sampled_from(["token", "sequence", "turn"]),
    low=st.sampled_from([0.0, 0.8]),
    high=st.sampled_from([1.1, 5.0]),
    normalise=st.sampled_from(["all", "kept"]),
)
kls = st.builds(
    KLConfig, estimator=st.sampled_from(sorted(KL_ESTIMATORS)), coefficient=st.just(0.1)
)
algorithms = st.builds(
    AlgorithmConfig,
    denominator=st.sampled_from(["rollout", "proximal"]),
    ratio_level=st.sampled_from(sorted(RATIO_LEVELS)),
    surrogate=st.sampled_from(sorted(SURROGATES)),
    clip_low=st.sampled_from([0.2, 0.5]),
    clip_high=st.sampled_from([0.1, 0.28]),
    dual_clip=st.sampled_from([None, 1.2]),
    correction=st.none() | corrections,
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
    return LossInputs(
        **{field.name: change(getattr(inputs, field.name)) for field in fields(inputs)}
    )


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
@settings(max_examples=200)
def test_loss_equals_a_version_made_of_loops(inputs, algorithm):
    assert policy_loss(inputs, algorithm)[0].item() == pytest.approx(
        loss_by_loops(inputs, algorithm), rel=1e-9, abs=1e-12
    )


@given(batches(), algorithms)
def test_gradient_of_token_ratios_equals_finite_differences(inputs, algorithm):
    # Only for the token level: the others are straight-through, and CISPO's weight is detached.
    algorithm = algorithm.model_copy(update={"ratio_level": "token"})
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


# ------------------------------------------------------------------ the formulas, written as loops


def loss_by_loops(inputs: LossInputs, algorithm: AlgorithmConfig) -> float:
    """The definition, a token at a time, in Python floats."""
    below = (
        inputs.rollout_logprobs if algorithm.denominator == "rollout" else inputs.proximal_logprobs
    )
    sequences = []
    for b in range(len(inputs.advantages)):
        tokens = [t for t in range(inputs.loss_mask.shape[1]) if inputs.loss_mask[b, t]]

        def at(values, t, b=b) -> float:
            return values[b, t].item()

        def level(name, above, below, t, tokens=tokens, at=at) -> float:
            ell = {s: at(above, s) - at(below, s) for s in tokens}
            turn = {s: at(inputs.turn_ids, s) for s in tokens}
            if name == "token":
                return ell[t]
            if name == "cumulative":
                return sum(ell[s] for s in tokens if s <= t)
            if name == "turn":
                return sum(ell[s] for s in tokens if turn[s] == turn[t])
            return sum(ell.values()) / (len(ell) if name == "sequence_geometric" else 1)

        kept = []
        for t in tokens:
            r = math.exp(level(algorithm.ratio_level, inputs.logprobs, below, t))
            advantage, logprob = inputs.advantages[b].item(), at(inputs.logprobs, t)
            low, high = 1 - algorithm.clip_low, 1 + algorithm.clip_high
            clipped = min(max(r, low), high)
            if algorithm.surrogate == "reinforce":
                loss = -advantage * logprob
            elif algorithm.surrogate == "cispo":
                loss = -clipped * advantage * logprob
            else:
                loss = max(-advantage * r, -advantage * clipped)
                if advantage < 0 and algorithm.dual_clip is not None:
                    loss = min(loss, -advantage * algorithm.dual_clip)
            if (correction := algorithm.correction) is not None:
                w = math.exp(
                    level(correction.level, inputs.proximal_logprobs, inputs.rollout_logprobs, t)
                )
                if correction.type == "tis":
                    w = min(w, correction.high)
                elif not correction.low <= w <= correction.high:
                    if correction.normalise == "kept":
                        continue
                    w = 0.0
                loss *= w
            if algorithm.kl is not None:
                d = at(inputs.reference_logprobs, t) - logprob
                kl = {"k1": -d, "k2": d * d / 2, "k3": math.exp(d) - d - 1}
                loss += algorithm.kl.coefficient * kl[algorithm.kl.estimator]
            kept.append(loss)
        if kept:
            sequences.append(kept)
    if not sequences:
        return 0.0
    if algorithm.aggregation == "token_mean":
        return sum(map(sum, sequences)) / sum(map(len, sequences))
    if algorithm.aggregation == "sequence_mean_token_sum":
        return sum(map(sum, sequences)) / len(sequences)
    return sum(sum(losses) / len(losses) for losses in sequences) / len(sequences)
