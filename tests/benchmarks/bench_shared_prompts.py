"""The gain of computing a group's prompt once.

    python -m tests.benchmarks.bench_shared_prompts [--width 576] [--layers 6] [--dtype bfloat16]

Prints the time and the peak memory of a training step with shared prompts relative to the same step
without, for groups of 8 and several ratios of prompt to completion, and the cost of ALP's noise
with and without sharing. Weights are random, and the vocabulary is small, so that decoder layers
dominate as in a large model. The variants take turns, so that other load affects all of them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence

from tests.benchmarks.synthetic import Size, groups_of, make_trainer
from tir_alp.config import TrainerConfig

GROUP_SIZE = 8


def main(options: argparse.Namespace) -> None:
    """Measure and print."""
    print(
        f"width {options.width}, {options.layers} layers, {options.dtype}, groups of {GROUP_SIZE}"
    )
    print("prompt  completion  computed  time, shared / not  ALP / Bypass, shared  not shared")
    for num_prompt, num_completion in options.shapes:
        size = Size(
            width=options.width,
            layers=options.layers,
            groups=options.groups,
            group_size=GROUP_SIZE,
            num_prompt=num_prompt,
            num_said=num_completion,
        )
        groups = groups_of(size)
        settings = {
            share: TrainerConfig(
                lr=1e-6, micro_batch_tokens=options.tokens, share_prompts=share, dtype=options.dtype
            )
            for share in (True, False)
        }
        variants = {
            (method, share): make_trainer(size, method, settings[share])
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
