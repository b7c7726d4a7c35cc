"""Tokens per second of each engine: python tests/benchmarks/bench_engines.py [--engines ...]

Three settings with 1, 8 and 32 concurrent requests, on a Qwen3 with 3.4 M random parameters in
float32:

- equal: prompts of 128 tokens, completions of 128;
- different: completions of 16 to 240 tokens, 128 on average;
- turns: three turns of 43 tokens, each with everything before it as prompt, and 20 tokens between.

`transformers generate` uses a static batch: it continues until its longest completion ends, and
tokens after the end of the others do not count. `--cpu-time` measures processor time of this
process and the servers instead of wall-clock time, for a machine with other load. vLLM is included
if `--vllm-python` names its Python.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from tir_alp.config import SGLangConfig, VLLMConfig
from tir_alp.engines.base import Engine, EngineContext, Sampling
from tir_alp.engines.transformers import TransformersEngine
from tir_alp.training.policy import load_policy

VOCABULARY = 2048
SETTINGS = ("equal", "different", "turns")

Job = tuple[tuple[int, ...], list[int]]
"""A prompt, and the lengths of the completions of its turns, in tokens."""

Work = Callable[[Sequence[Job]], Awaitable[None]]


def jobs(setting: str, count: int) -> list[Job]:
    draw = random.Random(0)
    made = []
    for _ in range(count):
        prompt = tuple(draw.randrange(VOCABULARY) for _ in range(128))
        lengths = {
            "equal": [128],
            "different": [draw.choice((16, 32, 64, 128, 160, 208, 240))],
            "turns": [43] * 3,
        }
        made.append((prompt, lengths[setting]))
    return made


def through(engine: Engine) -> Work:
    async def one(uid: int, prompt: tuple[int, ...], lengths: list[int]) -> None:
        for length in lengths:
            sampling = Sampling(max_tokens=length, sequence_uid=uid)
            completion = await engine.generate(prompt, sampling)
            assert len(completion.token_ids) == length
            prompt = (*prompt, *completion.token_ids, *range(20))

    async def work(given: Sequence[Job]) -> None:
        await asyncio.gather(*(one(uid, *job) for uid, job in enumerate(given)))

    return work


def static(model) -> Work:
    async def work(given: Sequence[Job]) -> None:
        ids = torch.tensor([prompt for prompt, _ in given])
        for turn in range(len(given[0][1])):
            longest = max(lengths[turn] for _, lengths in given)
            with torch.inference_mode():
                ids = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=True,
                    top_k=0,
                    min_new_tokens=longest,
                    max_new_tokens=longest,
                    pad_token_id=0,
                )
            ids = torch.cat([ids, torch.arange(20).expand(len(given), -1)], dim=1)

    return work


def cpu_seconds() -> float:
    """Return the processor time so far of this process and of its descendants."""
    children: dict[int, list[int]] = {}
    ticks: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            pid = int(stat.parent.name)
            children.setdefault(int(fields[1]), []).append(pid)
            ticks[pid] = int(fields[11]) + int(fields[12])
    found, total = [os.getpid()], 0
    while found:
        pid = found.pop()
        found += children.get(pid, ())
        total += ticks[pid]
    return total / os.sysconf("SC_CLK_TCK")


async def speed(
    work: Work, given: Sequence[Job], repeats: int, clock: Callable[[], float]
) -> float:
    """Return tokens per second: the median of some repetitions after a warm-up."""
    num_tokens = sum(sum(lengths) for _, lengths in given)
    seconds = []
    for _ in range(repeats + 1):
        start = clock()
        await work(given)
        seconds.append(clock() - start)
    return num_tokens / statistics.median(seconds[1:])


async def run(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    clock = cpu_seconds if options.cpu_time else time.perf_counter
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        context = EngineContext(path=folder, log=lambda line: print(line, file=sys.stderr))
        contestants: dict[str, Work] = {}
        if "transformers" in options.engines:
            contestants["transformers generate"] = static(
                AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            )
        if "embedded" in options.engines:
            engine = TransformersEngine(load_policy(folder), max_cache_tokens=1 << 16)
            stack.push_async_callback(engine.close)
            contestants["embedded"] = through(engine)
        if "sglang" in options.engines:
            from tir_alp.engines.sglang.engine import open_sglang

            os.environ["OMP_NUM_THREADS"] = str(options.threads)  # for the server
            servers = await stack.enter_async_context(
                open_sglang(
                    SGLangConfig(
                        type="sglang", device="cpu", dtype="float32", max_cache_tokens=1 << 16
                    ),
                    context,
                )
            )
            contestants["SGLang"] = through(servers)
        if options.vllm_python is not None:
            from tir_alp.engines.vllm.engine import open_vllm

            os.environ["OMP_NUM_THREADS"] = str(options.threads)
            server = await stack.enter_async_context(
                open_vllm(
                    VLLMConfig(
                        type="vllm",
                        python=options.vllm_python,
                        device="cpu",
                        dtype="float32",
                        max_cache_tokens=1 << 16,
                    ),
                    context,
                )
            )
            contestants["vLLM"] = through(server)
        print(
            f"| engine (threads: {options.threads}) | setting | 1 | 8 | 32 |\n|---|---|---|---|---|"
        )
        for setting in SETTINGS:
            for name, work in contestants.items():
                figures = [
                    await speed(work, jobs(setting, count), options.repeats, clock)
                    for count in (1, 8, 32)
                ]
                print(f"| {name} | {setting} | " + " | ".join(f"{x:.0f}" for x in figures) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    everything = ["transformers", "embedded", "sglang"]
    parser.add_argument("--engines", nargs="+", choices=everything, default=everything)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--vllm-python", type=Path)
    options = parser.parse_args()
    asyncio.run(run(options))


if __name__ == "__main__":
    main()
