"""The noise of ALP on the device: its seconds, its share of a training step, and what bounds it.

One call adds noise to all tokens of a training step in one layer, and its backward pass makes the
noise again for the gradient of sigma. The bound is the time in which the device copies the states:
a kernel that makes the noise in registers could not be faster. So share of a step times (1 - bound
/ seconds) is the most that a kernel of one's own could save.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.gpu.models import NAMES, shape_of
from tests.gpu.part import Task, copy_rate, perform, seconds_of
from tir_alp.algorithm.noise import name_hashes, normal, nth_keys
from tir_alp.algorithm.perturbation import _AddNoise

STATE_BYTES = 2  # bfloat16
METHODS_OF_STEP = "alp, not shared"


def keys_of(num_tokens: int, device: torch.device) -> Tensor:
    """Return [N] keys, as the tokens of one sequence have them."""
    return nth_keys(name_hashes(["0/0/0"]), torch.arange(num_tokens)).to(device)


def measure(width: int, task: Task, bandwidth: float) -> dict[str, float]:
    """Return the seconds of one layer: noise alone, added, and in the backward pass."""
    num_tokens, device = task.scale.step_tokens, task.device
    keys = keys_of(num_tokens, device)
    hidden = torch.randn(1, num_tokens, width, device=device, dtype=torch.bfloat16)
    hidden.requires_grad_()
    log_sigma = torch.full((), -4.6, device=device, requires_grad=True)
    grad = torch.randn_like(hidden)

    def add() -> Tensor:
        return _AddNoise.apply(hidden, log_sigma, keys, None, 1)

    def both() -> None:
        torch.autograd.grad(add(), (hidden, log_sigma), grad)

    def timed(work: Callable[[], object]) -> float:
        return seconds_of(work, device, task.scale.warm_up, task.scale.rounds)

    with torch.no_grad():
        made, added = timed(lambda: normal(keys, width)), timed(add)
    return {
        "noise_s": made,
        "forward_s": added,
        "forward_and_backward_s": timed(both),
        "random_numbers_s": timed(lambda: torch.randn(num_tokens, width, device=device)),
        # The forward reads the states and writes them; the backward reads their gradient.
        "bound_s": 3 * STATE_BYTES * num_tokens * width / bandwidth,
    }


def compiled(width: int, task: Task) -> dict[str, Any]:
    """Return the seconds of `normal` where torch.compile can fuse it, and whether bits agree."""
    keys = keys_of(task.scale.step_tokens, task.device)
    fused = torch.compile(normal, dynamic=False)
    try:
        is_equal = torch.equal(fused(keys, width), normal(keys, width))
    except Exception as error:  # the compiler's own errors have no common class
        return {"reason": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"[:300]}
    seconds = seconds_of(
        lambda: fused(keys, width), task.device, task.scale.warm_up, task.scale.rounds
    )
    return {"noise_s": seconds, "is_equal": is_equal}


def training_seconds(task: Task) -> dict[str, float]:
    """Return the seconds of the training step by model, if that part has measured them."""
    file: Path = task.report.file.with_name("training.json")
    if not file.exists():
        return {}
    figures = json.loads(file.read_text())["figures"]
    found = {name: figures.get(name, {}).get("variants", {}) for name in NAMES}
    return {
        name: variants[METHODS_OF_STEP]["seconds"]
        for name, variants in found.items()
        if METHODS_OF_STEP in variants
    }


def work(task: Task) -> None:
    """Measure the widths of every model."""
    bandwidth, steps = copy_rate(task.device, task.scale.copied), training_seconds(task)
    task.report.add("copied_bytes_per_s", bandwidth)
    for name in NAMES:
        shape = shape_of(name, is_reduced=task.is_reduced)
        with task.report.attempt(name):
            found: dict[str, Any] = dict(measure(shape.hidden_size, task, bandwidth))
            seconds = shape.num_hidden_layers * found["forward_and_backward_s"]
            of_step = steps.get(name)
            share = None if of_step is None else seconds / of_step
            saved = 1 - found["bound_s"] / found["forward_and_backward_s"]
            found |= {
                "tokens": task.scale.step_tokens,
                "width": shape.hidden_size,
                "layers": shape.num_hidden_layers,
                "step_s": seconds,
                "share_of_step": share,
                "most_saved_by_a_kernel": None if share is None else share * max(0.0, saved),
            }
            task.report.add(name, found)
    if task.device.type == "cuda":  # a CPU compiles for longer than all else takes
        task.report.add("compiled", compiled(1536, task))


if __name__ == "__main__":
    sys.exit(perform(work))
