"""Tokens per second of each engine: python -m tests.benchmarks.bench_engines [--engines ...]

Four settings, each with several numbers of concurrent requests:

- equal: prompts of 128 tokens, completions of 128;
- different: completions of 16 to 240 tokens, 128 on average;
- turns: three turns of 43 tokens, each with everything before it as prompt, and 20 tokens between,
  as a tool returns them;
- groups: the same turns, where eight requests have a prompt of 512 tokens in common.

The model is a Qwen3 with 3.4 M random parameters, or the folder that `--model` names. Every engine
gets the same prompts and has to return completions of the same lengths, which is checked. Prompts
are new in each repetition, and engines take turns, so that load from elsewhere meets all of them.

`transformers generate` uses a static batch: it continues until its longest completion ends, and
tokens after the end of the others do not count. `--cpu-time` measures processor time of this
process and the servers instead of wall-clock time, for a machine with other load. vLLM is included
if `--vllm-python` or TIR_ALP_VLLM_PYTHON names its Python.
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
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config

from tir_alp.config import SGLangConfig, TransformersConfig, VLLMConfig
from tir_alp.engines.base import Engine, EngineContext, Sampling
from tir_alp.engines.transformers import open_transformers

SETTINGS = ("equal", "different", "turns", "groups")
GROUP_SIZE = 8

Job = tuple[tuple[int, ...], list[int]]
"""A prompt, and the lengths of the completions of its turns, in tokens."""

Work = Callable[[Sequence[Job]], Awaitable[None]]


def jobs(setting: str, count: int, seed: int, num_words: int) -> list[Job]:
    draw = random.Random(seed)

    def prompt(length: int) -> tuple[int, ...]:
        return tuple(draw.randrange(num_words) for _ in range(length))

    if setting == "groups":
        prompts = [prompt(512) for _ in range(-(-count // GROUP_SIZE))]
        return [(prompts[index // GROUP_SIZE], [43] * 3) for index in range(count)]
    made = []
    for _ in range(count):
        lengths = {
            "equal": [128],
            "different": [draw.choice((16, 32, 64, 128, 160, 208, 240))],
            "turns": [43] * 3,
        }
        made.append((prompt(128), lengths[setting]))
    return made


def through(engine: Engine) -> Work:
    async def one(uid: int, prompt: tuple[int, ...], lengths: list[int]) -> None:
        for length in lengths:
            sampling = Sampling(max_tokens=length, sequence_uid=uid)
            completion = await engine.generate(prompt, sampling)
            if len(completion.token_ids) != length:
                raise RuntimeError(
                    f"asked for {length} tokens, got {len(completion.token_ids)} "
                    f"({completion.stop_reason})"
                )
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


async def speeds(
    contestants: dict[str, Work],
    given: Sequence[Sequence[Job]],
    clock: Callable[[], float],
) -> dict[str, float]:
    """Return tokens per second of each: the median over repetitions after one that warms up."""
    num_tokens = sum(sum(lengths) for _, lengths in given[0])
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for each in given:
        for name, work in contestants.items():
            start = clock()
            await work(each)
            seconds[name].append(clock() - start)
    return {name: num_tokens / statistics.median(found[1:]) for name, found in seconds.items()}


def write_model(folder: str) -> None:
    """Write the small model that is measured if no other is named."""
    config = Qwen3Config(
        vocab_size=2048,
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
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


async def opened(
    options: argparse.Namespace, folder: str, stack: AsyncExitStack
) -> dict[str, Work]:
    """Open what is compared, one after the other."""
    context = EngineContext(path=folder, log=lambda line: print(line, file=sys.stderr))
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # for the servers
    served = {"device": "cpu", "dtype": options.dtype, "max_cache_tokens": 1 << 16}
    contestants: dict[str, Work] = {}
    if "transformers" in options.engines:
        dtype = getattr(torch, options.dtype)
        contestants["transformers generate"] = static(
            AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        )
    if "embedded" in options.engines:
        config = TransformersConfig(precision=options.dtype, max_cache_tokens=1 << 16)
        engine = await stack.enter_async_context(open_transformers(config, context))
        contestants["embedded"] = through(engine)
    if "sglang" in options.engines:
        from tir_alp.engines.sglang.engine import open_sglang

        config = SGLangConfig.model_validate({"type": "sglang"} | served)
        engine = await stack.enter_async_context(open_sglang(config, context))
        contestants["SGLang"] = through(engine)
    if options.vllm_python is None:
        print("vLLM is not measured: TIR_ALP_VLLM_PYTHON names no Python of it", file=sys.stderr)
    else:
        from tir_alp.engines.vllm.engine import open_vllm

        config = VLLMConfig.model_validate({"type": "vllm", "python": options.vllm_python} | served)
        engine = await stack.enter_async_context(open_vllm(config, context))
        contestants["vLLM"] = through(engine)
    return contestants


async def run(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    clock = cpu_seconds if options.cpu_time else time.perf_counter
    async with AsyncExitStack() as stack:
        folder = options.model
        if folder is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            write_model(folder)
        num_words = AutoConfig.from_pretrained(folder).vocab_size
        contestants = await opened(options, folder, stack)
        print(
            f"{options.model or 'random Qwen3'}, {options.dtype}, threads: {options.threads}, load "
            f"at the start: {os.getloadavg()[0]:.1f}; in brackets: share of the best\n"
        )
        print(f"| engine | setting | {' | '.join(map(str, options.counts))} |")
        print("|---|---" + "|---" * len(options.counts) + "|")
        for setting in options.settings:
            found = []
            for count in options.counts:
                given = [
                    jobs(setting, count, seed, num_words) for seed in range(options.repeats + 1)
                ]
                found.append(await speeds(contestants, given, clock))
            for name in contestants:
                figures = [f"{x[name]:.0f} ({x[name] / max(x.values()):.2f})" for x in found]
                print(f"| {name} | {setting} | {' | '.join(figures)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    everything = ["transformers", "embedded", "sglang"]
    parser.add_argument("--engines", nargs="+", choices=everything, default=everything)
    parser.add_argument("--model", help="folder of another model in the Hugging Face form")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=SETTINGS)
    parser.add_argument("--counts", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--vllm-python", type=Path, default=os.environ.get("TIR_ALP_VLLM_PYTHON"))
    options = parser.parse_args()
    asyncio.run(run(options))


if __name__ == "__main__":
    main()
