"""What it costs that a thread which no longer computes keeps its compute threads.

    python -m tests.benchmarks.bench_compute_threads [--model FOLDER] [--precision bfloat16]

Prints the median seconds of a decode step of the embedded engine where the thread that loaded the
model has released its compute threads, and where it still has them; the two take turns. The model
is the random Qwen3 of `bench_against_trl.py`, or the folder that `--model` names.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from tests.benchmarks.against_trl.models import write_tiny
from tir_alp.engines.base import Sampling
from tir_alp.engines.transformers import TransformersEngine
from tir_alp.training.compute_threads import release_threads
from tir_alp.training.policy import load_policy

NUM_TOKENS = 32
"""Of each completion."""


async def decode(engine: TransformersEngine, count: int) -> float:
    """Sample from `count` short prompts at once; returns the seconds per step."""
    prompts = [tuple(6 + (7 * n + uid) % 250 for n in range(8)) for uid in range(count)]
    asked = [Sampling(max_tokens=NUM_TOKENS, sequence_uid=uid) for uid in range(count)]
    began = time.perf_counter()
    await asyncio.gather(*map(engine.generate, prompts, asked))
    return (time.perf_counter() - began) / NUM_TOKENS


async def measure(options: argparse.Namespace, folder: str) -> None:
    """Print the medians."""
    model = load_policy(folder)
    engine = TransformersEngine(model, max_cache_tokens=65536, precision=options.precision)
    steps: dict[bool, list[float]] = {True: [], False: []}
    for number in range(2 * options.rounds + 2):
        is_released = number % 2 == 0
        _ = torch.ones(900, 900) @ torch.ones(900, 900)  # this thread has some again
        if is_released:
            release_threads()
        seconds = await decode(engine, options.requests)
        if number > 1:  # the first of each warms up
            steps[is_released].append(seconds)
    await engine.close()
    released, kept = (1e3 * statistics.median(steps[each]) for each in (True, False))
    print(
        f"{torch.get_num_threads()} threads, {options.requests} requests, {options.precision}: "
        f"{released:.1f} ms per step if released, {kept:.1f} ms if kept: {kept / released:.2f}"
    )


def main() -> None:
    """Read the options and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="Hugging Face folder")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.model or write_tiny(Path(scratch) / "qwen3")
        asyncio.run(measure(options, str(folder)))


if __name__ == "__main__":
    main()
