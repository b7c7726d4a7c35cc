"""What ALP costs and what packing gains, on trajectories that the tiny model really rolls out.

    python tests/benchmarks/bench_training_step.py [--rounds 15] [--width 512]

Prints, from one process each and with the variants taking turns, so that a noisy machine hurts all
alike: the time of a training step with ALP over the same step without, and over that of GRPO, which
also needs the proximal logprobs; both with and without gradient checkpointing; the throughput of
packed over padded micro-batches; the peak memory of each. `--width` takes random weights of another
width instead of the tiny model's: noise costs as much as a layer is wide, a layer its square.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tir_alp.assembly import open_run
from tir_alp.attention import PACKED
from tir_alp.batch import Sample, loss_positions, pack
from tir_alp.config import ALGORITHMS, TrainerConfig, load_config, read_toml
from tir_alp.parallel import alone
from tir_alp.policy import load_policy, token_logprobs
from tir_alp.tiny import BASE, TRAIN_CONFIG
from tir_alp.train import with_advantages
from tir_alp.trainer import Trainer
from tir_alp.types import Batch

CONFIG = TrainerConfig(lr=1e-4, updates_per_step=2)


def roll_out() -> list[list[Sample]]:
    """The samples of the first step of the default run."""

    async def take() -> list[list[Sample]]:
        config = load_config(["--name", "bench"], read_toml(TRAIN_CONFIG))
        async with open_run(config) as run:
            return with_advantages(await run.rollouts.take(), config)

    home = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        samples = asyncio.run(take())
        os.chdir(home)
    return samples


def make_policy(width: int | None) -> Any:
    """The tiny model, or one of its kind with another width and random weights."""
    if width is None:
        return load_policy(str(BASE))
    config = AutoConfig.from_pretrained(BASE)
    config.hidden_size, config.intermediate_size, config.head_dim = width, 3 * width, width // 4
    return AutoModelForCausalLM.from_config(config, attn_implementation=PACKED)


def packed_step(
    algorithm: str, width: int | None, gradient_checkpointing: bool = False
) -> Callable[[Sequence[Sequence[Sample]]], None]:
    """The trainer's own step."""
    trainer = Trainer(
        make_policy(width),
        CONFIG.model_copy(update={"gradient_checkpointing": gradient_checkpointing}),
        ALGORITHMS[algorithm],
        ranks=alone(),
        temperature=1.0,
        on_bad_update=lambda *_: None,
    )
    steps = iter(range(10**9))
    return lambda samples: (trainer.step(samples, next(steps)), None)[1]


def padded_step() -> Callable[[Sequence[Sequence[Sample]]], None]:
    """The same updates (Bypass without clipping) as padded rows through the library's attention."""
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=CONFIG.lr)

    def update(batch: Batch) -> None:
        rows = torch.nn.utils.rnn.pad_sequence(
            list(batch.token_ids.split(batch.lengths)), batch_first=True
        )
        lengths = torch.tensor(batch.lengths)
        real = torch.arange(rows.shape[1]) < lengths[:, None]
        hidden = model.base_model(rows, attention_mask=real.long(), use_cache=False)[0][real]
        places = loss_positions(batch)
        logprobs, _ = token_logprobs(model, hidden[places - 1], batch.token_ids[places])
        ratios = (logprobs - batch.rollout_logprobs[batch.loss_mask]).exp()
        advantages = batch.advantages.repeat_interleave(batch.loss_mask.sum(1))
        loss = -(ratios * advantages).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    def step(samples: Sequence[Sequence[Sample]]) -> None:
        half = len(samples) // 2
        for part in (samples[:half], samples[half:]):
            for batch in pack([each for group in part for each in group], 10**9):
                update(batch)

    return step


def interleaved(
    steps: dict[str, Callable[[Sequence[Sequence[Sample]]], None]],
    samples: Sequence[Sequence[Sample]],
    rounds: int,
) -> dict[str, list[float]]:
    """Seconds of each variant, which take turns; the first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step(samples)
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds


VARIANTS = {
    "alp_sequence": ("alp_sequence", False),
    "bypass_sequence": ("bypass_sequence", False),
    "grpo": ("grpo", False),
    "alp_sequence, checkpointed": ("alp_sequence", True),
    "bypass_sequence, checkpointed": ("bypass_sequence", True),
}


def make_step(variant: str, width: int | None) -> Callable[[Sequence[Sequence[Sample]]], None]:
    """The step of a variant."""
    if variant == "padded":
        return padded_step()
    algorithm, gradient_checkpointing = VARIANTS[variant]
    return packed_step(algorithm, width, gradient_checkpointing)


def peak_memory_mb(variant: str, width: int | None, samples: Sequence[Sequence[Sample]]) -> float:
    """Memory that a second step adds to a new process, at its highest.

    The first makes the optimizer's moments and whatever else stays.
    """
    step = make_step(variant, width)
    step(samples)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is in use now
    before = _peak_kb()
    step(samples)
    return (_peak_kb() - before) / 1024


def _peak_kb() -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--width", type=int, default=None)
    arguments = parser.parse_args()
    rounds, width = arguments.rounds, arguments.width
    samples = roll_out()
    lengths = [len(each.trajectory.token_ids) for group in samples for each in group]
    tokens = sum(lengths)
    print(f"{len(lengths)} trajectories, {tokens} tokens, lengths {min(lengths)} to {max(lengths)}")
    variants = [*VARIANTS, *(["padded"] if width is None else [])]
    steps = {variant: make_step(variant, width) for variant in variants}
    seconds = interleaved(steps, samples, rounds)
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"{name:30} {median * 1e3:7.1f} ms a step, {tokens / median:9.0f} tokens/s (median)")

    def ratio(above: str, below: str) -> str:
        each = [a / b for a, b in zip(seconds[above], seconds[below], strict=True)]
        low, middle, high = statistics.quantiles(each, n=4)
        best = min(seconds[above]) / min(seconds[below])
        return (
            f"{middle:.3f} (quartiles {low:.3f} to {high:.3f} of {rounds} pairs; "
            f"{best:.3f} between the fastest)"
        )

    print(f"ALP over Bypass:               {ratio('alp_sequence', 'bypass_sequence')}")
    both = "alp_sequence, checkpointed", "bypass_sequence, checkpointed"
    print(f"ALP over Bypass, checkpointed: {ratio(*both)}")
    print(f"ALP over GRPO:                 {ratio('alp_sequence', 'grpo')}")
    if width is None:
        print(f"packed over padded throughput: {ratio('padded', 'bypass_sequence')}")
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for variant in variants:
            peak = pool.apply(peak_memory_mb, (variant, width, samples))
            print(f"peak memory of a step, {variant:30} {peak:7.1f} MB")


if __name__ == "__main__":
    main()
