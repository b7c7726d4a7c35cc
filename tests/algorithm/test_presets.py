"""Every preset: its value and gradient, and what must not change them."""

import math
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.algorithm import reference
from tir_alp.algorithm.inputs import LossInputs
from tir_alp.algorithm.loss import loss_counts, policy_loss
from tir_alp.algorithm.presets import (
    ALGORITHMS,
    AlgorithmConfig,
    CorrectionConfig,
    CriterionConfig,
    KLConfig,
    RejectionConfig,
)

torch.set_num_threads(1)

GRPO = ALGORITHMS["grpo"]
COMBINED = {
    "lower truncation": {"correction": CorrectionConfig(type="tis", low=0.9, high=1.1)},
    "three criteria": {
        "rejection": RejectionConfig(
            measure="k3",
            level="sequence_max",
            high=0.05,
            also=(
                CriterionConfig(measure="k2", level="sequence_geometric", high=0.01),
                CriterionConfig(level="token", low=0.8, normalise="all"),
            ),
        )
    },
    "total variation of the current policy": {
        "rejection": RejectionConfig(
            measure="binary_tv", numerator="current", high=0.05, normalise="all"
        )
    },
    "largest ratio": {"rejection": RejectionConfig(level="sequence_max", high=1.3)},
    "unbiased KL": {"kl": KLConfig(weight="ratio", coefficient=0.5)},
    "mean weight of 1, kept": {
        "correction": CorrectionConfig(type="mis", low=0.9, mean_one=True, normalise="kept")
    },
}
METHODS = dict(ALGORITHMS) | {
    name: GRPO.model_copy(update=settings) for name, settings in COMBINED.items()
}


def case_of(
    seed: int, spread: float = 0.25, one_per_row: bool = True
) -> tuple[reference.Case, np.ndarray]:
    rng = np.random.default_rng(seed)
    shape = (4, 7)
    rollout = -rng.uniform(0.05, 3.0, shape)
    proximal = np.minimum(rollout + spread * rng.normal(size=shape), -0.01)
    current = np.minimum(proximal + spread * rng.normal(size=shape), -0.01)
    mask = rng.random(shape) < 0.7
    mask[3] = seed % 3 != 0  # sometimes a sequence without loss tokens
    advantages = np.repeat(rng.normal(size=(4, 1)), 7, 1)
    if not one_per_row:
        advantages = rng.normal(size=shape)
    turns = np.sort(rng.integers(0, 3, shape), axis=1)
    return (
        reference.Case(
            rollout,
            proximal,
            np.minimum(rollout + spread * rng.normal(size=shape), -0.01),
            advantages,
            mask,
            turns,
            rng.random(shape) < 0.5,
            rng.random(shape),
        ),
        current,
    )


def inputs_of(case: reference.Case, current: np.ndarray, algorithm: AlgorithmConfig) -> LossInputs:
    """Tensors of a case, NaN outside the mask; what a method does not read is left out."""

    def tensor(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.where(case.mask, values, math.nan))

    return LossInputs(
        logprobs=tensor(current).requires_grad_(),
        rollout_logprobs=tensor(case.rollout),
        advantages=tensor(case.advantages),
        loss_mask=torch.from_numpy(case.mask),
        proximal_logprobs=tensor(case.proximal),
        reference_logprobs=tensor(case.reference) if algorithm.kl else None,
        turn_ids=torch.from_numpy(case.turns),
        entropy=tensor(case.entropy).requires_grad_() if algorithm.entropy_bonus else None,
        selected=torch.from_numpy(case.selected) if algorithm.selection else None,
    )


def gradient_of(inputs: LossInputs, algorithm: AlgorithmConfig, *counts):
    inputs = replace(inputs, logprobs=inputs.logprobs.detach().clone().requires_grad_())
    loss, metrics = policy_loss(inputs, algorithm, *counts)
    loss.backward()
    assert inputs.logprobs.grad is not None
    return loss.detach(), inputs.logprobs.grad, metrics


@pytest.mark.parametrize("name", METHODS)
def test_value_and_gradient_equal_the_reference(name: str):
    algorithm, step = METHODS[name], 1e-6
    for seed in range(6):
        case, current = case_of(seed, one_per_row=seed % 2 == 0)
        loss, gradient, metrics = gradient_of(inputs_of(case, current, algorithm), algorithm)
        expected = reference.loss(algorithm, case, current, current)
        assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert all(value.isfinite() for value in metrics.values())
        for b, t in np.argwhere(case.mask):
            shift = np.zeros(case.mask.shape)
            shift[b, t] = step
            sides = [reference.loss(algorithm, case, current + s, current) for s in (shift, -shift)]
            slope = (sides[0] - sides[1]) / (2 * step)
            assert gradient[b, t].item() == pytest.approx(slope, rel=1e-5, abs=1e-8)
        assert (gradient[~torch.from_numpy(case.mask)] == 0).all()


@pytest.mark.parametrize("name", METHODS)
def test_on_policy_every_preset_is_a_plain_policy_gradient(name: str):
    """Where all policies agree, nothing is clipped, weighted or rejected."""
    algorithm = METHODS[name]
    case, _ = case_of(1)
    case = replace(case, proximal=case.rollout, reference=case.rollout)
    _, gradient, _ = gradient_of(inputs_of(case, case.rollout, algorithm), algorithm)
    lengths, rows = case.mask.sum(1), (case.mask.sum(1) > 0).sum()
    share = {
        "token_mean": np.full(4, 1 / lengths.sum()),
        "sequence_mean_token_mean": 1 / np.maximum(lengths, 1) / rows,
        "sequence_mean_token_sum": np.full(4, 1 / rows),
    }[algorithm.aggregation]
    expected = -case.advantages * share[:, None] * case.mask
    if algorithm.selection is not None:
        effect = reference.EFFECTS.get(algorithm.selection.type, "mark")
        expected *= {"keep": case.selected, "drop": ~case.selected, "mark": 1}[effect]
    np.testing.assert_allclose(gradient.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("name", METHODS)
def test_micro_batches_order_and_padding_do_not_matter(name: str):
    algorithm = METHODS[name]
    case, current = case_of(2)
    whole = inputs_of(case, current, algorithm)
    loss, gradient, metrics = gradient_of(whole, algorithm)

    def changed(change) -> LossInputs:
        found = {each.name: getattr(whole, each.name) for each in fields(whole)}
        given: dict[str, Any] = {
            key: change(value.detach()) for key, value in found.items() if value is not None
        }
        return LossInputs(**given)

    parts = [changed(lambda x: x[:1]), changed(lambda x: x[1:])]
    columns = zip(*(loss_counts(part, algorithm) for part in parts), strict=True)
    counts = [sum(column) for column in columns]
    found = [gradient_of(part, algorithm, *counts) for part in parts]
    torch.testing.assert_close(sum(each[0] for each in found), loss)
    torch.testing.assert_close(torch.cat([each[1] for each in found]), gradient)
    for key, value in metrics.items():
        torch.testing.assert_close(sum(each[2][key] for each in found), value, msg=key)

    order = torch.tensor([2, 0, 3, 1])
    other = changed(lambda x: torch.nn.functional.pad(x[order], (1, 2)))
    other_loss, other_gradient, _ = gradient_of(other, algorithm)
    torch.testing.assert_close(other_loss, loss)
    torch.testing.assert_close(other_gradient[:, 1:-2], gradient[order])


def test_the_entropy_bonus_has_a_gradient_of_its_own():
    case, current = case_of(1)
    algorithm = ALGORITHMS["entropy_bonus"]
    inputs = inputs_of(case, current, algorithm)
    policy_loss(inputs, algorithm)[0].backward()
    assert inputs.entropy is not None and inputs.entropy.grad is not None
    expected = np.where(case.mask, -algorithm.entropy_bonus / case.mask.sum(), 0)
    np.testing.assert_allclose(inputs.entropy.grad.numpy(), expected)


def test_there_are_enough_presets():
    assert len(ALGORITHMS) >= 30


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"options": {"tau": 1.0}}, "no option of the surrogate 'clip' 'tau'"),
        ({"surrogate": "kl_cov"}, "the surrogate 'kl_cov' needs a selection"),
        ({"rejection": {"numerator": "current"}}, 'needs normalise = "all"'),
        ({"rejection": {"measure": "k1", "low": 0.1}}, "the measure k1 has no lower bound"),
        ({"correction": {"type": "tis", "low": 3.0}}, r"low \(3.0\) is above high \(2.0\)"),
        ({"proximal": "interpolated", "advantage": "otb"}, "which a baseline of tokens needs"),
        ({"proximal": "interpolated", "rejection": {"low": 0.5}}, 'which normalise = "kept" needs'),
    ],
)
def test_what_cannot_be_combined_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        AlgorithmConfig.model_validate(GRPO.model_dump() | changes)
