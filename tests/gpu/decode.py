"""The embedded engine in bfloat16: tokens per second of 8, 32 and 128 sequences.

The seconds of a decode step are the difference between long and short completions, so that the
prefill is in neither. Beside them is the time that reading all weights once takes.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from typing import Any

from tests.gpu.models import NAMES, make_model, num_multiplied
from tests.gpu.part import Task, copy_rate, perform, wait_for
from tir_alp.engines.base import Sampling
from tir_alp.engines.transformers import TransformersEngine

NUM_PROMPT, SHORT = 64, 2


async def step_seconds(engine: TransformersEngine, words: int, count: int, task: Task) -> float:
    """Return the seconds of one decode step of `count` sequences."""
    draw, num_tokens = random.Random(0), task.scale.decode_tokens

    async def one(uid: int, most: int) -> int:
        prompt = tuple(draw.randrange(words) for _ in range(NUM_PROMPT))
        sampling = Sampling(max_tokens=most, sequence_uid=uid)  # no token ends it
        return len((await engine.generate(prompt, sampling)).token_ids)

    async def all_of_them(most: int) -> float:
        wait_for(task.device)
        began = time.perf_counter()
        lengths = await asyncio.gather(*(one(uid, most) for uid in range(count)))
        wait_for(task.device)
        assert lengths == [most] * count, f"completions of {most} tokens have {lengths}"
        return time.perf_counter() - began

    await all_of_them(SHORT)
    # The fastest of several: a pause in either would be part of the difference.
    pairs = [
        (await all_of_them(SHORT), await all_of_them(SHORT + num_tokens))
        for _ in range(task.scale.rounds)
    ]
    short, long = (min(seconds) for seconds in zip(*pairs, strict=True))
    if long <= short:
        raise ValueError(f"{num_tokens} more tokens took no longer: the machine is too busy")
    return (long - short) / num_tokens


async def measure(model: Any, task: Task, bandwidth: float) -> dict[str, Any]:
    """Return the seconds of a step and the tokens per second, by number of sequences."""
    engine = TransformersEngine(model, max_cache_tokens=1 << 16, precision="bfloat16")
    layers, head = num_multiplied(model)
    num_bytes, rows = 2 * (layers + head), {}
    try:
        for count in task.scale.decoded:
            seconds = await step_seconds(engine, model.config.vocab_size, count, task)
            rows[str(count)] = {
                "seconds_per_step": seconds,
                "tokens_per_s": count / seconds,
                "reading_weights_s": num_bytes / bandwidth,
            }
    finally:
        await engine.close()
    return rows


def work(task: Task) -> None:
    """Measure every model."""
    bandwidth = copy_rate(task.device, task.scale.copied)
    task.report.add("copied_bytes_per_s", bandwidth)
    for name in NAMES:
        with task.report.attempt(name):
            rows = asyncio.run(measure(make_model(name, task), task, bandwidth))
            task.report.add(name, rows)


if __name__ == "__main__":
    sys.exit(perform(work))
