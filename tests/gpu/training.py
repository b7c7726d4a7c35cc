"""Training steps in bfloat16: tokens per second, MFU, peak memory, and what ALP and sharing cost.

Groups of 8 with one completion each. Every variant has a trainer and weights of its own, one after
the other, because several of them need not fit into the device's memory.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from typing import Any

import torch

from tests.benchmarks.synthetic import Size, groups_of
from tests.gpu.models import NAMES, folder_of, make_model, num_multiplied
from tests.gpu.part import GROUP_SIZE, Scale, Task, free_memory, perform, product_rate, seconds_of
from tir_alp.algorithm.presets import ALGORITHMS
from tir_alp.config import TrainerConfig
from tir_alp.training.ranks import alone
from tir_alp.training.trainer import Trainer
from tir_alp.types import Batch

METHODS = {"alp": "alp_sequence", "bypass": "bypass_sequence"}
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}
"""FLOP per second of dense bfloat16 products by the data sheets, in the fastest form of a card."""


def step_flops(model: Any, scale: Scale, *, share: bool) -> float:
    """Return the FLOPs of the forward and backward pass of a step, without recomputed ones.

    6 per weight and token that is computed, the head's only where a loss token is predicted; and in
    attention 12 per layer, pair of tokens and channel of the heads.
    """
    layers, head = num_multiplied(model)
    config = model.config
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    prompt, completion = scale.num_prompt, scale.num_completion
    num_prompts = 1 if share else GROUP_SIZE
    computed = num_prompts * prompt + GROUP_SIZE * completion
    pairs = num_prompts * prompt**2 / 2
    pairs += GROUP_SIZE * (prompt * completion + completion**2 / 2)
    attention = 12 * config.num_hidden_layers * width * pairs
    per_group = 6 * layers * computed + 6 * head * GROUP_SIZE * completion + attention
    return scale.groups * per_group


def measure(name: str, method: str, task: Task, *, share: bool) -> dict[str, float | None]:
    """Return the seconds, the FLOPs and the peak memory of a training step."""
    scale, on_gpu = task.scale, task.device.type == "cuda"
    model = make_model(name, task)
    flops = step_flops(model, scale, share=share)
    bad: list[int] = []

    def note(update: int, _: Sequence[Batch]) -> None:
        bad.append(update)

    trainer = Trainer(
        model,
        TrainerConfig(
            lr=1e-9,
            dtype="bfloat16",
            micro_batch_tokens=scale.micro_batch_tokens,
            share_prompts=share,
        ),
        ALGORITHMS[METHODS[method]],
        ranks=alone(task.device),
        temperature=1.0,
        on_bad_update=note,
    )
    groups = groups_of(
        Size(
            groups=scale.groups,
            group_size=GROUP_SIZE,
            num_prompt=scale.num_prompt,
            num_said=scale.num_completion,
        )
    )
    numbers = itertools.count()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(task.device)
    seconds = seconds_of(
        lambda: trainer.step(groups, next(numbers)), task.device, scale.warm_up, scale.rounds
    )
    if bad:
        raise ValueError(f"updates {bad} of {name} were not finite")
    peak = torch.cuda.max_memory_allocated(task.device) / 1e9 if on_gpu else None
    return {"seconds": seconds, "flops": flops, "peak_memory_gb": peak}


def peak_flops(measured: float, device: torch.device) -> tuple[float, str]:
    """Return the rate that MFU is relative to, and where it is from."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for card, rate in PEAK_FLOPS.items():
            if card in name.split() or card in name.replace("-", " ").split():
                return rate, f"data sheet of {card}"
    return measured, "measured product"


def work(task: Task) -> None:
    """Measure every model, with and without sharing and noise."""
    scale, report = task.scale, task.report
    measured = product_rate(task.device, scale.matrix)
    peak, source = peak_flops(measured, task.device)
    report.add("product_flops_per_s", measured)
    report.add("peak", {"flops_per_s": peak, "source": source})
    num_tokens = scale.step_tokens
    report.add(
        "step",
        {
            "groups": scale.groups,
            "group_size": GROUP_SIZE,
            "num_prompt": scale.num_prompt,
            "num_completion": scale.num_completion,
            "tokens": num_tokens,
        },
    )
    for name in NAMES:
        rows: dict[str, dict[str, Any]] = {}
        for share, method in itertools.product((True, False), METHODS):
            variant = f"{method}, {'shared' if share else 'not shared'}"
            with report.attempt(f"{name}, {variant}"):
                found = measure(name, method, task, share=share)
                seconds, flops = found["seconds"], found["flops"]
                assert seconds is not None and flops is not None
                rows[variant] = found | {
                    "tokens_per_s": num_tokens / seconds,
                    "mfu": flops / seconds / peak,
                }
            report.add(
                name,
                {
                    "weights": "random" if folder_of(name, task) is None else "SmolLM2-135M",
                    "variants": rows,
                    **ratios(rows),
                },
            )
            free_memory()


def ratios(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Return ALP over Bypass and shared over not shared, in time and in peak memory."""

    def ratio(above: str, below: str) -> dict[str, float | None]:
        found: dict[str, float | None] = {}
        for figure in ("seconds", "peak_memory_gb"):
            pair = [rows.get(variant, {}).get(figure) for variant in (above, below)]
            found[figure] = pair[0] / pair[1] if all(pair) else None  # type: ignore[operator]
        return found

    return {
        "alp_over_bypass, shared": ratio("alp, shared", "bypass, shared"),
        "alp_over_bypass, not shared": ratio("alp, not shared", "bypass, not shared"),
        "shared_over_not_shared": ratio("alp, shared", "alp, not shared"),
    }


if __name__ == "__main__":
    sys.exit(perform(work))
