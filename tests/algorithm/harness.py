"""Tiny models, their noise, and one update of them."""

import math
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tir_alp.algorithm.inputs import LossInputs
from tir_alp.algorithm.loss import policy_loss
from tir_alp.algorithm.perturbation import LayerwisePerturbation, NoiseKey, PaddingSide
from tir_alp.algorithm.presets import PerturbationConfig

torch.set_num_threads(1)

HIDDEN, VOCABULARY = 32, 64
ARCHITECTURES = ["qwen2", "qwen3", "llama", "mistral", "gemma", "gpt_neox", "gpt2"]
LENGTHS = [5, 3, 7]
KEYS = [NoiseKey(update=2, sequence_uid=uid) for uid in (11, 12, 13)]


def tiny(architecture: str = "qwen2", num_layers: int = 2) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
    }
    if architecture not in ("gpt_neox", "gpt2"):
        sizes |= {"num_key_value_heads": 2, "head_dim": 16}
    if architecture == "gpt2":
        sizes |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = CONFIG_MAPPING[architecture](**sizes)
    return AutoModelForCausalLM.from_config(config).train()


def perturbed(model: nn.Module, **config) -> LayerwisePerturbation:
    return LayerwisePerturbation(
        model, PerturbationConfig.model_validate({"init_std": 0.1} | config)
    )


class Block(nn.Module):
    """A layer that returns its input, so that its output is the input with noise."""

    def forward(self, hidden_states):
        return hidden_states


class Stack(nn.Module):
    """A model of `Block`s: its output minus its input is the sum of the noise of all layers."""

    def __init__(self, num_layers: int = 1):
        super().__init__()
        self.embedding = nn.Embedding(2, 2)  # so that the model has parameters
        self.layers = nn.ModuleList(Block() for _ in range(num_layers))

    def forward(self, hidden, by_name=False):
        for layer in self.layers:
            hidden = layer(hidden_states=hidden) if by_name else layer(hidden)
        return hidden


def noise(
    keys, lengths, hidden, layers=None, num_layers=1, side: PaddingSide = "right", **config
) -> torch.Tensor:
    """Return what a `Stack` with sigma 1 adds to `hidden`."""
    p = perturbed(model := Stack(num_layers), init_std=1.0, layers=layers, **config)
    with p.active(keys, lengths, padding_side=side), torch.no_grad():
        return model(hidden) - hidden


def batch(lengths=LENGTHS):
    """Return token ids [B, T] with right padding, and the mask of the tokens."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (len(lengths), max(lengths)), generator=generator)
    return ids, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def gradient_of(p: LayerwisePerturbation) -> torch.Tensor:
    assert p.log_sigma.grad is not None
    return p.log_sigma.grad.clone()


def logprobs(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Return logprobs [B, T - 1] of all tokens but the first; right padding needs no mask."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)


def step(model, algorithm, perturbation=None):
    """Return loss and gradients of one update on the batch; without noise if there is none."""
    model.zero_grad()
    ids, mask = batch()
    rollout = torch.full((3, 6), -math.log(VOCABULARY))

    def backward():
        inputs = LossInputs(
            logprobs=logprobs(model, ids),
            rollout_logprobs=rollout,
            advantages=torch.tensor([1.0, -1.0, 0.5]),
            loss_mask=mask[:, 1:],
        )
        loss, _ = policy_loss(inputs, algorithm)
        loss.backward()
        return loss.detach()

    if perturbation is None:
        loss = backward()
    else:
        perturbation.log_sigma.grad = None
        with perturbation.active(KEYS, LENGTHS):
            loss = backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    if perturbation is not None and perturbation.log_sigma.grad is not None:
        gradients["log_sigma"] = perturbation.log_sigma.grad.clone()
    return loss, gradients


def assert_same(actual, expected):
    loss, gradients = actual
    assert torch.equal(loss, expected[0])
    assert gradients.keys() == expected[1].keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected[1][name]), name
