"""Where the seconds of a real model go, and what the processor allows.

    tir-alp models smollm2 --out smollm2
    python tests/benchmarks/bench_real_model.py smollm2 [--threads 2] [--dtypes float32 bfloat16]

Prints, for each precision:

- the limits of the processor: the rate of a large matrix product in FLOP/s, and the rate at which
  weights are read, which is that of a matrix-vector product with a matrix beyond the caches;
- a decode step of the embedded engine for 1, 8 and 32 sequences, beside the time that reading all
  weights once takes: no engine that reads each weight once per step can be faster;
- a training step on one micro-batch, beside the time that its FLOPs take: 6 per parameter and
  token, and the attention's. The input embedding is looked up and not multiplied, so it counts only
  where it is also the head, and there for the tokens of the loss alone;
- the shares of the training step by kind of operation.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from tir_alp.algorithm.presets import ALGORITHMS
from tir_alp.config import TrainerConfig
from tir_alp.engines.base import Sampling
from tir_alp.engines.transformers import TransformersEngine
from tir_alp.tools.outcome import Outcome
from tir_alp.training.policy import load_policy
from tir_alp.training.ranks import alone
from tir_alp.training.trainer import Trainer
from tir_alp.types import Sample, StopReason, TokenSpan, Trajectory, Turn

NUM_PROMPT, NUM_COMPLETION, GROUP_SIZE, NUM_GROUPS = 64, 48, 8, 2
KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear"),
    "attention": ("scaled_dot_product",),
    "copies and casts": ("aten::copy_", "aten::cat", "aten::index_select", "aten::clone"),
    "softmax over words": ("softmax",),
    "optimizer": ("_fused_adamw_", "_foreach", "aten::fill_"),
}


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    """Return the median of some calls after one that warms up."""
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def flops_per_second(dtype: torch.dtype) -> float:
    """Return the rate of a product of the shape of a layer of the model's."""
    a, b = torch.randn(2048, 1536).to(dtype), torch.randn(1536, 576).to(dtype)
    return 2 * 2048 * 1536 * 576 / median_seconds(lambda: a @ b, 20)


def bytes_per_second(dtype: torch.dtype) -> float:
    """Return the rate at which a matrix that fits into no cache is read by a product."""
    a, x = torch.randn(16384, 8192).to(dtype), torch.randn(8192).to(dtype)
    return a.numel() * a.element_size() / median_seconds(lambda: a @ x, 5)


def num_multiplied(model: Any) -> tuple[int, int]:
    """Return the number of parameters that multiply every token, and that of the head."""
    head = model.get_output_embeddings().weight.numel()
    layers = sum(each.numel() for each in model.base_model.layers.parameters())
    return layers, head


async def decode_seconds(model: Any, count: int) -> float:
    """Return the seconds of one decode step of `count` sequences, without the prefill."""
    engine = TransformersEngine(model, max_cache_tokens=1 << 15)
    draw = random.Random(0)
    words = model.config.vocab_size

    async def one(uid: int, num_tokens: int) -> None:
        prompt = tuple(draw.randrange(words) for _ in range(NUM_PROMPT))
        # No token ends a completion, so that all sequences are in every step.
        await engine.generate(prompt, Sampling(max_tokens=num_tokens, sequence_uid=uid))

    async def all_of_them(num_tokens: int) -> float:
        began = time.perf_counter()
        await asyncio.gather(*(one(uid, num_tokens) for uid in range(count)))
        return time.perf_counter() - began

    await all_of_them(4)
    short, long = await all_of_them(4), await all_of_them(36)
    await engine.close()
    return (long - short) / 32


def groups_of(words: int) -> list[list[Sample]]:
    """Return groups whose members have a prompt in common and one completion each."""
    rng, groups = random.Random(0), []
    for group in range(NUM_GROUPS):
        prompt = TokenSpan(tuple(rng.randrange(words) for _ in range(NUM_PROMPT)))
        samples = []
        for member in range(GROUP_SIZE):
            ids = tuple(rng.randrange(words) for _ in range(NUM_COMPLETION))
            said = TokenSpan(ids, (-10.0,) * NUM_COMPLETION)
            turn = Turn(said, TokenSpan(()), 0, StopReason.STOP, Outcome.OK, 0.0)
            uid = group * GROUP_SIZE + member
            each = Trajectory("t", group, prompt, (turn,), True, False, uid)
            samples.append(Sample(each, rng.uniform(-1, 1)))
        groups.append(samples)
    return groups


def training(path: Path, dtype: str, rate: float, repeats: int, share: bool) -> None:
    """Measure a training step, and print it with the time that its FLOPs take."""
    model = load_policy(str(path))
    layers, head = num_multiplied(model)
    groups = groups_of(model.config.vocab_size)
    trainer = Trainer(
        model,
        TrainerConfig.model_validate({"lr": 1e-9, "dtype": dtype, "share_prompts": share}),
        ALGORITHMS["bypass_sequence"],
        ranks=alone(),
        temperature=1.0,
        on_bad_update=lambda update, _: print(f"update {update} was not finite"),
    )
    numbers = iter(range(1000))
    seconds = median_seconds(lambda: trainer.step(groups, next(numbers)), repeats)
    computed = NUM_GROUPS * (
        NUM_PROMPT * (1 if share else GROUP_SIZE) + GROUP_SIZE * NUM_COMPLETION
    )
    scored = NUM_GROUPS * GROUP_SIZE * NUM_COMPLETION
    # The head is computed once more in the backward pass, where its logits are made again.
    flops = 6 * layers * computed + 8 * head * scored
    total = NUM_GROUPS * GROUP_SIZE * (NUM_PROMPT + NUM_COMPLETION)
    print(
        f"training, prompts {'shared' if share else 'not shared'}: {seconds:.2f} s for {total} "
        f"tokens, of which {computed} are computed; its products take {flops / rate:.2f} s at the "
        f"limit ({flops / rate / seconds:.0%})"
    )
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        trainer.step(groups, next(numbers))
    print("  " + shares_of(profiled))


def shares_of(profiled: profile) -> str:
    """Return the share of each kind of operation in the time of all of them."""
    events = profiled.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    found: dict[str, float] = defaultdict(float)
    for event in events:
        kind = next((k for k, names in KINDS.items() if any(n in event.key for n in names)), "rest")
        found[kind] += event.self_cpu_time_total / total
    return ", ".join(f"{kind} {share:.0%}" for kind, share in sorted(found.items()))


def measure(path: Path, dtype_name: str, repeats: int) -> None:
    """Measure one precision."""
    dtype = getattr(torch, dtype_name)
    rate, reading = flops_per_second(dtype), bytes_per_second(dtype)
    print(f"\n{dtype_name}: {rate / 1e9:.0f} GFLOP/s, weights are read at {reading / 1e9:.1f} GB/s")
    model = load_policy(str(path)).to(dtype).eval()
    layers, head = num_multiplied(model)
    num_bytes = (layers + head) * torch.empty((), dtype=dtype).element_size()
    floor = num_bytes / reading
    print(
        f"decode: {num_bytes / 1e6:.0f} MB of weights per step, {floor * 1e3:.1f} ms at the limit"
    )
    for count in (1, 8, 32):
        found = asyncio.run(decode_seconds(model, count))
        least = max(floor, 2 * (layers + head) * count / rate)
        print(
            f"  {count:2} sequences: {found * 1e3:.1f} ms per step, {count / found:.0f} tokens/s; "
            f"limit {least * 1e3:.1f} ms ({least / found:.0%})"
        )
    del model
    for share in (True, False):
        training(path, dtype_name, rate, repeats, share)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{options.model}, {options.threads} threads, torch {torch.__version__}")
    for name in options.dtypes:
        measure(options.model, name, options.repeats)


if __name__ == "__main__":
    main()
