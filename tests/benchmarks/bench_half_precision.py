"""The mismatch of trainer and embedded engine when both compute in one precision.

    python -m tests.benchmarks.bench_half_precision [--model tiny-able] [--tokens 2000]

The engine samples after prompts of held-out tasks; the trainer computes the logprob of each sampled
token by the forward that it trains with. The table is that of `tir_alp.studies.mismatch`.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence

import torch

from tir_alp.algorithm.presets import ALGORITHMS
from tir_alp.config import DataConfig, TrainerConfig
from tir_alp.engines.base import Sampling
from tir_alp.engines.transformers import TransformersEngine
from tir_alp.models.resolve import resolve
from tir_alp.rollouts.data import load_held_out
from tir_alp.rollouts.renderer import Renderer
from tir_alp.studies.mismatch import HEADER, Measurement
from tir_alp.training.policy import load_policy, load_tokenizer
from tir_alp.training.ranks import alone
from tir_alp.training.trainer import Trainer

_TOKENS_EACH = 64


async def measure(path: str, dtype: str, num_tokens: int) -> Measurement:
    """Sample at least `num_tokens` tokens at temperature 1, and compare both sides."""
    # Adapters that are 0, so that there is no optimizer of the weights, which takes most memory.
    settings = TrainerConfig.model_validate({"dtype": dtype, "lora": {"rank": 1}})
    trainer = Trainer(
        load_policy(path),
        settings,
        ALGORITHMS["grpo"],
        ranks=alone(),
        temperature=1.0,
        on_bad_update=lambda update, batches: None,
    )
    engine = TransformersEngine(load_policy(path), max_cache_tokens=1 << 15, precision=dtype)
    renderer = Renderer(load_tokenizer(path))
    prompts = [renderer.prompt(task.question).token_ids for task in load_held_out(DataConfig(), 64)]
    differences: list[float] = []
    while len(differences) < num_tokens:
        uid = len(differences)
        batch = prompts[:16] if not uid else prompts[16:32]
        done = await asyncio.gather(
            *(
                engine.generate(each, Sampling(max_tokens=_TOKENS_EACH, sequence_uid=uid + index))
                for index, each in enumerate(batch)
            )
        )
        for prompt, each in zip(batch, done, strict=True):
            expected = trainer.completion_logprobs(prompt, each.token_ids)
            differences += [a - b for a, b in zip(expected, each.logprobs, strict=True)]
    await engine.close()
    return Measurement(dtype, 1.0, torch.tensor(differences))


def main(arguments: Sequence[str] | None = None) -> None:
    found = argparse.ArgumentParser("python -m tests.benchmarks.bench_half_precision")
    found.add_argument("--model", default="tiny-able", help="name, folder or Hugging Face id")
    found.add_argument("--tokens", type=int, default=2000, help="least number of tokens per row")
    options = found.parse_args(arguments)
    print(HEADER.replace("engine dtype", "dtype of both"))
    for dtype in ("float32", "bfloat16", "float16"):
        print(asyncio.run(measure(resolve(options.model), dtype, options.tokens)).line())


if __name__ == "__main__":
    main()
