"""The gain of computing a group's prompt once.

    python tests/benchmarks/bench_shared_prompts.py [--width 576] [--layers 6] [--dtype bfloat16]

Prints the time and the peak memory of a training step with shared prompts relative to the same step
without, for groups of 8 and several ratios of prompt to completion, and the cost of ALP's noise
with and without sharing. Weights are random, and the vocabulary is small, so that decoder layers
dominate as in a large model. The variants take turns, so that other load affects all of them.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tir_alp.algorithm.presets import ALGORITHMS
from tir_alp.config import TrainerConfig
from tir_alp.tools.outcome import Outcome
from tir_alp.training.attention import PACKED
from tir_alp.training.ranks import alone
from tir_alp.training.trainer import Trainer
from tir_alp.types import Sample, StopReason, TokenSpan, Trajectory, Turn

VOCABULARY = 1000
GROUP_SIZE = 8


def groups_of(num_groups: int, num_prompt: int, num_completion: int) -> list[list[Sample]]:
    """Return groups with a prompt in common, and one completion each."""
    rng = random.Random(0)

    def words(number: int) -> tuple[int, ...]:
        return tuple(rng.randrange(VOCABULARY) for _ in range(number))

    def sample(group: int, prompt: TokenSpan, uid: int) -> Sample:
        said = TokenSpan(words(num_completion), (-6.9,) * num_completion)
        turn = Turn(said, TokenSpan(()), 0, StopReason.STOP, Outcome.OK, 0.0)
        return Sample(Trajectory("t", group, prompt, (turn,), True, False, uid), rng.uniform(-1, 1))

    return [
        [sample(group, prompt, group * GROUP_SIZE + member) for member in range(GROUP_SIZE)]
        for group in range(num_groups)
        for prompt in [TokenSpan(words(num_prompt))]
    ]


def make_trainer(options: argparse.Namespace, method: str, share: bool) -> Trainer:
    """Return a trainer of random weights; every one begins with the same."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=options.width,
        intermediate_size=options.width * 8 // 3,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 64,
        num_key_value_heads=max(1, options.width // 192),
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation=PACKED)
    settings = TrainerConfig(
        lr=1e-6, micro_batch_tokens=options.tokens, share_prompts=share, dtype=options.dtype
    )
    return Trainer(
        model,
        settings,
        ALGORITHMS[method],
        ranks=alone(),
        temperature=1.0,
        on_bad_update=lambda update, _: print(f"update {update} was not finite"),
    )


def main(options: argparse.Namespace) -> None:
    """Measure and print."""
    print(
        f"width {options.width}, {options.layers} layers, {options.dtype}, groups of {GROUP_SIZE}"
    )
    print("prompt  completion  computed  time, shared / not  ALP / Bypass, shared  not shared")
    for num_prompt, num_completion in options.shapes:
        groups = groups_of(options.groups, num_prompt, num_completion)
        variants = {
            (method, share): make_trainer(options, method, share)
            for method in ("alp_sequence", "bypass_sequence")
            for share in (True, False)
        }
        times = {name: [] for name in variants}
        computed = 0.0
        for step in range(options.rounds + 1):
            for name, trainer in variants.items():
                began = time.perf_counter()
                metrics = trainer.step(groups, step).metrics
                if step:  # the first one also allocates
                    times[name].append(time.perf_counter() - began)
                if name[1]:
                    computed = 1 - metrics["train/shared_tokens"]
        alp = {share: times["alp_sequence", share] for share in (True, False)}
        bypass = {share: times["bypass_sequence", share] for share in (True, False)}
        print(
            f"{num_prompt:6}  {num_completion:10}  {computed:8.3f}  "
            f"{ratio(alp[True], alp[False]):18.3f}  {ratio(alp[True], bypass[True]):20.3f}  "
            f"{ratio(alp[False], bypass[False]):10.3f}",
            flush=True,
        )


def ratio(one: Sequence[float], other: Sequence[float]) -> float:
    """Median of the ratios of the rounds."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=576, help="a multiple of 192")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=4096, help="trainer.micro_batch_tokens")
    parser.add_argument("--dtype", default="float32")
    main_options = parser.parse_args()
    main_options.shapes = [(256, 64), (128, 128), (64, 192)]
    main(main_options)
