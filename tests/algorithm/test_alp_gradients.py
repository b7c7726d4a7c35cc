"""Gradients of ALP's whole objective in float64: model, noise and loss, sigma included."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config

from tir_alp.algorithm.inputs import LossInputs
from tir_alp.algorithm.loss import policy_loss
from tir_alp.algorithm.perturbation import LayerwisePerturbation, NoiseKey
from tir_alp.algorithm.presets import (
    ALGORITHMS,
    AlgorithmConfig,
    CorrectionConfig,
    KLConfig,
    PerturbationConfig,
    RejectionConfig,
)

torch.set_num_threads(1)

LENGTHS = (5, 3, 7)
KEYS = [NoiseKey(2, uid) for uid in (11, 12, 13)]
STEP = 1e-5


class Perturbed:
    """A tiny policy with noise, and the inputs of its loss except its own logprobs."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 16}
        no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        # GPT-2 has no RMSNorm, which transformers computes in float32.
        config = GPT2Config(**sizes, **no_dropout)  # type: ignore[arg-type]
        self.model: Any = AutoModelForCausalLM.from_config(config).double().train()
        self.noise = LayerwisePerturbation(self.model, PerturbationConfig(init_std=0.1))
        self.noise.log_sigma.data = self.noise.log_sigma.data.double()
        self.ids = torch.randint(0, 40, (3, 7))
        places = torch.arange(1, 7).expand(3, 6)
        self.mask = places < torch.tensor(LENGTHS)[:, None]
        self.turn_ids = torch.where(self.mask, places // 3, -1)
        with torch.no_grad():
            near = self.logprobs()
        self.rollout, self.proximal, self.reference = (
            near + 0.2 * torch.randn_like(near) for _ in range(3)
        )

    def logprobs(self) -> Tensor:
        with self.noise.active(KEYS, LENGTHS):
            logits = self.model(input_ids=self.ids, use_cache=False).logits[:, :-1]
        return logits.log_softmax(-1).gather(-1, self.ids[:, 1:, None]).squeeze(-1)

    def loss(self, logprobs: Tensor, algorithm: AlgorithmConfig) -> Tensor:
        inputs = LossInputs(
            logprobs=logprobs,
            rollout_logprobs=self.rollout,
            advantages=torch.tensor([1.0, -0.5, 0.7], dtype=torch.float64),
            loss_mask=self.mask,
            proximal_logprobs=self.proximal,
            reference_logprobs=self.reference,
            turn_ids=self.turn_ids,
        )
        return policy_loss(inputs, algorithm)[0]


def variant(name: str, **changes) -> AlgorithmConfig:
    return ALGORITHMS[name].model_copy(update=changes)


def difference(parameter: Tensor, index: int, loss: Callable[[], Tensor]) -> float:
    """Central finite difference in one element."""
    sides = []
    for shift in (STEP, -STEP):
        parameter.data.view(-1)[index] += shift
        with torch.no_grad():
            sides.append(loss().item())
        parameter.data.view(-1)[index] -= shift
    return (sides[0] - sides[1]) / (2 * STEP)


CORRECTION = CorrectionConfig(type="tis", level="turn", high=1.1)
REJECTION = RejectionConfig(level="sequence_geometric", low=0.9, high=1.2)


@pytest.mark.parametrize(
    "algorithm",
    [
        variant("alp_token"),
        variant("alp_token", correction=CORRECTION),
        variant("alp_token", rejection=REJECTION, aggregation="sequence_mean_token_mean"),
        variant("alp_token", kl=KLConfig(coefficient=0.1)),
        variant("alp_token", surrogate="reinforce"),
    ],
)
def test_gradients_of_sigma_and_weights_equal_finite_differences(algorithm):
    policy = Perturbed()

    def loss() -> Tensor:
        return policy.loss(policy.logprobs(), algorithm)

    weight = policy.model.transformer.h[0].mlp.c_fc.weight
    sigma, weights = torch.autograd.grad(loss(), [policy.noise.log_sigma, weight])
    for parameter, gradient in ((policy.noise.log_sigma, sigma), (weight, weights)):
        assert gradient.abs().max() > 1e-6
        for index in (0, 1):
            expected = difference(parameter, index, loss)
            assert gradient.view(-1)[index].item() == pytest.approx(expected, rel=1e-5, abs=1e-10)


@pytest.mark.parametrize("level", ["sequence", "sequence_geometric", "turn", "cumulative"])
def test_a_straight_through_level_weighs_the_gradient_of_each_logprob(level):
    """The value depends on the whole sequence, the gradient does not: -A r_t / N per token."""
    policy = Perturbed()
    open_window = variant("alp_sequence", ratio_level=level, clip_low=1.0, clip_high=1e9)
    open_window = open_window.model_copy(update={"dual_clip": None})
    logprobs = policy.logprobs()
    found = torch.autograd.grad(
        policy.loss(logprobs, open_window), policy.noise.log_sigma, retain_graph=True
    )[0]
    ell = torch.where(policy.mask, logprobs - policy.rollout, 0.0).detach()
    log_ratios = {
        "sequence": ell.sum(1, keepdim=True).expand_as(ell),
        "sequence_geometric": (ell.sum(1) / policy.mask.sum(1))[:, None].expand_as(ell),
        "turn": torch.stack(
            [
                torch.stack([row[turns == turn].sum() for turn in turns])
                for row, turns in zip(ell, policy.turn_ids, strict=True)
            ]
        ),
        "cumulative": ell.cumsum(1),
    }[level]
    advantages = torch.tensor([[1.0], [-0.5], [0.7]], dtype=torch.float64)
    slopes = -advantages * log_ratios.exp() * policy.mask / policy.mask.sum()
    expected = torch.autograd.grad(logprobs, policy.noise.log_sigma, slopes)[0]
    torch.testing.assert_close(found, expected)
