"""The cost of ALP and the gain of packing, on real trajectories of the tiny model.

    python tests/benchmarks/bench_training_step.py [--rounds 25] [--width 512] [--cpu-time]

Prints the time of a training step with ALP relative to the same step without it, with and without
gradient checkpointing, and relative to that of GRPO, which also needs proximal logprobs; the
throughput of packed relative to padded micro-batches; and the peak memory of each. The variants
take turns, so that other load on the machine affects all of them. `--width` uses random weights of
another width instead of the tiny model: the cost of noise is proportional to the width of a layer,
and that of the layer to its square. `--cpu-time` measures the processor time of one thread instead
of wall-clock time, for a machine with other load. The last two ratios of times are the
cost of the probe, with which each step computes the logprobs of some tokens without noise, and that
of measuring the policy without noise on all tokens, in a step that does it.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

from tir_alp.algorithm.presets import ALGORITHMS
from tir_alp.config import MetricsConfig, TrainerConfig
from tir_alp.doctor.start import Doctor
from tir_alp.models.tiny import BASE, TRAIN_CONFIG
from tir_alp.run.command_line import load_config, read_toml
from tir_alp.run.local_placement import LocalPlacement
from tir_alp.run.open_run import open_run
from tir_alp.train import with_advantages
from tir_alp.training.attention import PACKED
from tir_alp.training.batch import loss_positions, pack
from tir_alp.training.policy import load_policy, token_logprobs
from tir_alp.training.ranks import alone
from tir_alp.training.step_metrics import MadeUpdate
from tir_alp.training.trainer import Trainer
from tir_alp.types import Batch, Sample

CONFIG = TrainerConfig(lr=1e-4, updates_per_step=2)


def roll_out() -> list[list[Sample]]:
    """Return the samples of the first step of the default run, by group."""

    async def take() -> list[list[Sample]]:
        config = load_config(["--name", "bench"], read_toml(TRAIN_CONFIG))
        async with open_run(config, LocalPlacement(config), Doctor()) as run:
            return with_advantages(await run.rollouts.take(), config)

    home = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        samples = asyncio.run(take())
        os.chdir(home)
    return samples


def make_policy(width: int | None) -> Any:
    """Return the tiny model, or a model like it with another width and random weights."""
    if width is None:
        return load_policy(str(BASE))
    config = AutoConfig.from_pretrained(BASE)
    config.hidden_size, config.intermediate_size, config.head_dim = width, 3 * width, width // 4
    return AutoModelForCausalLM.from_config(config, attn_implementation=PACKED)


class WithoutProbe(Trainer):
    """Computes no logprobs without noise for its metrics."""

    def _update(
        self, batches: Sequence[Batch], update: int, probe: int | None, measure_clean: bool
    ) -> MadeUpdate | None:
        return super()._update(batches, update, None, measure_clean)


def packed_step(
    algorithm: str,
    width: int | None,
    gradient_checkpointing: bool = False,
    kind: type[Trainer] = Trainer,
    clean_every: int = 0,
) -> Callable[[Sequence[Sequence[Sample]]], None]:
    """Return the trainer's own step."""
    trainer = kind(
        make_policy(width),
        CONFIG.model_copy(update={"gradient_checkpointing": gradient_checkpointing}),
        ALGORITHMS[algorithm],
        ranks=alone(),
        temperature=1.0,
        on_bad_update=lambda *_: None,
        clean_every=clean_every,
    )
    numbers = itertools.count()
    return lambda samples: (trainer.step(samples, next(numbers)), None)[1]


def padded_step() -> Callable[[Sequence[Sequence[Sample]]], None]:
    """Return a step with the same updates, unclipped, on padded rows with standard attention."""
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=CONFIG.lr)

    def update(batch: Batch) -> None:
        rows = torch.nn.utils.rnn.pad_sequence(
            list(batch.token_ids.split(batch.lengths)), batch_first=True
        )
        lengths = torch.tensor(batch.lengths)
        real = torch.arange(rows.shape[1]) < lengths[:, None]
        hidden = model.base_model(rows, attention_mask=real.long(), use_cache=False)[0][real]
        positions = loss_positions(batch)
        logprobs, _ = token_logprobs(model, hidden[positions - 1], batch.token_ids[positions])
        ratios = (logprobs - batch.rollout_logprobs[batch.loss_mask]).exp()
        advantages = batch.advantages.repeat_interleave(batch.loss_mask.sum(1))
        loss = -(ratios * advantages).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    def step(samples: Sequence[Sequence[Sample]]) -> None:
        half = len(samples) // 2
        for groups in (samples[:half], samples[half:]):
            for batch in pack([each for group in groups for each in group], 10**9):
                update(batch)

    return step


def interleaved(
    steps: dict[str, Callable[[Sequence[Sequence[Sample]]], None]],
    samples: Sequence[Sequence[Sample]],
    rounds: int,
    clock: Callable[[], float],
) -> dict[str, list[float]]:
    """Return the seconds of each variant by round; they take turns, after one warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            start = clock()
            step(samples)
            if turn:
                seconds[name].append(clock() - start)
    return seconds


VARIANTS: dict[str, tuple[Any, ...]] = {
    "alp_sequence": ("alp_sequence",),
    "bypass_sequence": ("bypass_sequence",),
    "alp_sequence, checkpointed": ("alp_sequence", True),
    "bypass_sequence, checkpointed": ("bypass_sequence", True),
    "alp_sequence, without its probe": ("alp_sequence", False, WithoutProbe),
    "alp_sequence, measured clean": ("alp_sequence", False, Trainer, 1),
    "grpo": ("grpo",),
}


def make_step(variant: str, width: int | None) -> Callable[[Sequence[Sequence[Sample]]], None]:
    """Return the step of a variant."""
    if variant == "padded":
        return padded_step()
    algorithm, *how = VARIANTS[variant]
    return packed_step(algorithm, width, *how)


def peak_memory_mb(variant: str, width: int | None, samples: Sequence[Sequence[Sample]]) -> float:
    """Return the megabytes of all tensors at the peak of a second step, with weights and moments.

    They are counted and not read from the process, because what the allocator keeps varies. The
    first step creates the moments and everything else that persists.
    """
    step = make_step(variant, width)
    step(samples)
    gc.collect()
    tensors = [each for each in gc.get_objects() if isinstance(each, torch.Tensor)]
    # A rank's shard is a tensor itself; the DTensor has no storage.
    found = [each.untyped_storage() for each in tensors if not isinstance(each, DTensor)]
    before = sum({storage.data_ptr(): storage.nbytes() for storage in found}.values())
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step(samples)
    recorded: Any = profile.profiler
    events = [each for each in recorded.kineto_results.events() if each.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return (before + max(itertools.accumulate(event.nbytes() for event in events))) / 2**20


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--width", type=int, default=None)
    parser.add_argument("--cpu-time", action="store_true")
    arguments = parser.parse_args()
    rounds, width = arguments.rounds, arguments.width
    samples = roll_out()
    lengths = [len(each.trajectory.token_ids) for group in samples for each in group]
    tokens = sum(lengths)
    print(f"{len(lengths)} trajectories, {tokens} tokens, lengths {min(lengths)} to {max(lengths)}")
    variants = [*VARIANTS, *(["padded"] if width is None else [])]
    steps = {variant: make_step(variant, width) for variant in variants}
    clock = time.perf_counter
    if arguments.cpu_time:
        torch.set_num_threads(1)
        clock = time.process_time
    seconds = interleaved(steps, samples, rounds, clock)
    for name, values in seconds.items():
        median = statistics.median(values)
        print(
            f"{name:30} {median * 1e3:7.1f} ms per step, {tokens / median:9.0f} tokens/s (median)"
        )

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
    print(
        f"ALP over ALP without probe:    {ratio('alp_sequence', 'alp_sequence, without its probe')}"
    )
    measured = ratio("alp_sequence, measured clean", "alp_sequence")
    every = MetricsConfig().clean_every
    print(f"ALP measured clean over ALP:   {measured}, in one of {every} steps")
    if width is None:
        print(f"packed over padded throughput: {ratio('padded', 'bypass_sequence')}")
    peaks: dict[str, float] = {}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for variant in variants:
            peaks[variant] = pool.apply(peak_memory_mb, (variant, width, samples))
            print(f"peak memory of a step, {variant:30} {peaks[variant]:7.1f} MB")
    for kind in ("", ", checkpointed"):
        share = peaks[f"alp_sequence{kind}"] / peaks[f"bypass_sequence{kind}"]
        print(f"peak memory, ALP over Bypass{kind}: {share:.3f}")


if __name__ == "__main__":
    main()
