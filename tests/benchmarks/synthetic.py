"""Random models and trajectories of chosen sizes, for benchmarks of the training step."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from tir_alp.algorithm.presets import ALGORITHMS
from tir_alp.config import TrainerConfig
from tir_alp.tools.outcome import Outcome
from tir_alp.training.attention import PACKED
from tir_alp.training.ranks import alone
from tir_alp.training.trainer import Trainer
from tir_alp.types import Sample, StopReason, TokenSpan, Trajectory, Turn


@dataclass(frozen=True, slots=True)
class Size:
    """Size of a model and of the groups of one training step."""

    width: int = 576
    """Of the hidden state; a multiple of 192."""
    layers: int = 6
    vocabulary: int = 1000
    groups: int = 2
    group_size: int = 8
    num_prompt: int = 128
    """Tokens of the prompt that a group has in common."""
    turns: int = 1
    num_said: int = 64
    """Tokens that the model writes in each turn."""
    num_observed: int = 0
    """Tokens of the observation after each turn but the last."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all trajectories, prompts included."""
        tail = self.turns * self.num_said + (self.turns - 1) * self.num_observed
        return self.groups * self.group_size * (self.num_prompt + tail)


def groups_of(size: Size) -> list[list[Sample]]:
    """Return groups of random tokens with random advantages; always the same for a size."""
    rng = random.Random(0)

    def words(number: int) -> tuple[int, ...]:
        return tuple(rng.randrange(size.vocabulary) for _ in range(number))

    def turn(number: int) -> Turn:
        said = TokenSpan(words(size.num_said), (-6.9,) * size.num_said)
        observed = TokenSpan(words(size.num_observed if number < size.turns - 1 else 0))
        return Turn(said, observed, 0, StopReason.STOP, Outcome.OK, 0.0)

    def sample(group: int, prompt: TokenSpan, uid: int) -> Sample:
        turns = tuple(turn(number) for number in range(size.turns))
        return Sample(Trajectory("t", group, prompt, turns, True, False, uid), rng.uniform(-1, 1))

    return [
        [sample(group, prompt, group * size.group_size + each) for each in range(size.group_size)]
        for group in range(size.groups)
        for prompt in [TokenSpan(words(size.num_prompt))]
    ]


def make_model(size: Size) -> PreTrainedModel:
    """Return a random model; all of a size have the same weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=size.width,
        intermediate_size=size.width * 8 // 3,
        num_hidden_layers=size.layers,
        num_attention_heads=size.width // 64,
        num_key_value_heads=max(1, size.width // 192),
        vocab_size=size.vocabulary,
        max_position_embeddings=1 << 15,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation=PACKED)


def make_trainer(size: Size, method: str, settings: TrainerConfig) -> Trainer:
    """Return a trainer of `make_model`'s model."""
    return Trainer(
        make_model(size),
        settings,
        ALGORITHMS[method],
        ranks=alone(),
        temperature=1.0,
        on_bad_update=lambda update, _: print(f"update {update} was not finite"),
    )
