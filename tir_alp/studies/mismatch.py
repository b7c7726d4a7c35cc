"""Measures the training-inference mismatch: trainer and engine logprobs at equal weights.

    python -m tir_alp.studies.mismatch [--model tiny-able] [--engine sglang]
        [--dtypes float32 bfloat16] [--temperatures 1.0 0.7] [--tokens 3000] [--out mismatch.png]

Each engine samples, and the trainer's forward in float32 computes the logprob of each sampled
token. The table has d = trainer - engine, and e^d, the ratio that a policy gradient would see. In
float32 the difference is rounding error only, which verifies that everything else is equal.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tir_alp.config import DataConfig, SGLangConfig
from tir_alp.engines.base import Completion, Engine, EngineContext, Sampling
from tir_alp.engines.transformers import TransformersEngine
from tir_alp.models.resolve import resolve
from tir_alp.process import run_command
from tir_alp.rollouts.data import load_held_out
from tir_alp.rollouts.renderer import Renderer
from tir_alp.training.attention import PackedSequences
from tir_alp.training.policy import (
    compute_device,
    hidden_states,
    load_policy,
    load_tokenizer,
    token_logprobs,
)

_TOKENS_EACH = 64
_NUM_AT_ONCE = 32
_QUANTILES = (0.02, 0.5, 0.98)


@dataclass(frozen=True, slots=True)
class Measurement:
    """The differences at one dtype and temperature."""

    dtype: str
    temperature: float
    differences: torch.Tensor
    """[N] logprob by the trainer minus logprob by the engine, of each sampled token, in nats."""

    def line(self) -> str:
        """Return the table's row."""
        d = self.differences.double()
        low, middle, high = torch.quantile(d.exp(), torch.tensor(_QUANTILES).double()).tolist()
        return (
            f"| {self.dtype} | {self.temperature:g} | {len(d)} | {d.abs().max():.1e} "
            f"| {d.abs().mean():.1e} | {d.mean():+.1e} | {low:.5f} | {middle:.5f} | {high:.5f} |"
        )


HEADER = (
    "| engine dtype | temperature | tokens | max abs d | mean abs d | mean d "
    "| P2 of e^d | P50 | P98 |\n|---|---|---|---|---|---|---|---|---|"
)


@torch.no_grad()
def trainer_logprobs(
    model: Any, prompt: Sequence[int], completion: Completion, temperature: float
) -> torch.Tensor:
    """Return the logprobs of a completion's tokens, [N], by one forward of the trainer's model."""
    ids = torch.tensor((*prompt, *completion.token_ids), device=model.device)
    position_ids = torch.arange(len(ids), device=ids.device)
    hidden = hidden_states(model, ids, position_ids, PackedSequences((len(ids),), ids.device))
    start = len(prompt)
    logprobs, _ = token_logprobs(
        model, hidden[start - 1 : -1], ids[start:], temperature=temperature
    )
    return logprobs.cpu()


async def measure(
    engine: Engine,
    model: Any,
    prompts: Sequence[tuple[int, ...]],
    *,
    dtype: str,
    temperature: float,
    num_tokens: int,
) -> Measurement:
    """Sample at least `num_tokens` tokens, and compare each logprob with the trainer's."""
    differences: list[torch.Tensor] = []
    count = uid = 0
    while count < num_tokens:
        uids = range(uid, uid + _NUM_AT_ONCE)
        uid += _NUM_AT_ONCE
        completions = await asyncio.gather(
            *(
                engine.generate(
                    prompts[each % len(prompts)],
                    Sampling(max_tokens=_TOKENS_EACH, temperature=temperature, sequence_uid=each),
                )
                for each in uids
            )
        )
        for each, completion in zip(uids, completions, strict=True):
            expected = trainer_logprobs(
                model, prompts[each % len(prompts)], completion, temperature
            )
            differences.append(expected - torch.tensor(completion.logprobs))
            count += len(completion.token_ids)
    return Measurement(dtype, temperature, torch.cat(differences))


@asynccontextmanager
async def _opened(name: str, path: str, model: Any, dtype: str) -> AsyncIterator[Engine]:
    if name == "transformers":
        own = load_policy(path, model.device)
        engine = TransformersEngine(own, max_cache_tokens=1 << 16, precision=dtype)
        try:
            yield engine
        finally:
            await engine.close()
        return
    from tir_alp.engines.sglang.engine import open_sglang

    settings = SGLangConfig.model_validate(
        {
            "type": "sglang",
            "device": model.device.type,
            "dtype": dtype,
            "max_cache_tokens": 1 << 16,
        }
    )
    context = EngineContext(path=path, log=lambda line: print(line, file=sys.stderr))
    async with open_sglang(settings, context) as engine:
        yield engine


def draw(measurements: Sequence[Measurement], out: Path) -> None:
    """Plot the distribution of |d|, one line per measurement."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for each in measurements:
        ordered = each.differences.abs().clamp_min(1e-9).sort().values
        share = torch.arange(1, len(ordered) + 1) / len(ordered)
        axes.plot(ordered, share, label=f"{each.dtype}, temperature {each.temperature:g}")
    axes.set(
        xscale="log", xlabel="|logprob of trainer - engine|, nats", ylabel="share of the tokens"
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out, dpi=120)


async def run(options: argparse.Namespace) -> list[Measurement]:
    """Measure every dtype at every temperature, and print one row for each."""
    path = resolve(options.model)
    model = load_policy(path, compute_device("auto")).eval()
    renderer = Renderer(load_tokenizer(path))
    tasks = load_held_out(DataConfig(), 64)
    prompts = [renderer.prompt(task.question).token_ids for task in tasks]
    measurements = []
    print(HEADER)
    for dtype in options.dtypes:
        async with _opened(options.engine, path, model, dtype) as engine:
            for temperature in options.temperatures:
                measured = await measure(
                    engine,
                    model,
                    prompts,
                    dtype=dtype,
                    temperature=temperature,
                    num_tokens=options.tokens,
                )
                print(measured.line(), flush=True)
                measurements.append(measured)
    return measurements


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = argparse.ArgumentParser(
        "python -m tir_alp.studies.mismatch", description=(__doc__ or "").split("\n")[0]
    )
    found.add_argument("--model", default="tiny-able", help="name, folder or Hugging Face id")
    found.add_argument("--engine", choices=["sglang", "transformers"], default="sglang")
    found.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    found.add_argument("--temperatures", nargs="+", type=float, default=[1.0, 0.7])
    found.add_argument("--tokens", type=int, default=3000, help="least number of tokens per row")
    found.add_argument("--out", type=Path, help="file for a picture of the distributions")
    return found


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    options = parser().parse_args(arguments)
    try:
        measurements = asyncio.run(run(options))
    except ValueError as error:
        print(f"tir_alp.studies.mismatch: {error}", file=sys.stderr)
        return 2
    if options.out is not None:
        draw(measurements, options.out)
        print(f"picture: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
