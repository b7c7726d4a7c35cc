"""The learning rate over a run, as a share of `trainer.lr`: a pure function of the step.

Nothing of it is saved: a run that is resumed, or rolled back to an earlier checkpoint, has at each
step the rate that it would have had anyway.
"""

from __future__ import annotations

import math

from tir_alp.config import TrainerConfig


def lr_factor(config: TrainerConfig, num_steps: int | None, step: int) -> float:
    """Return the share of `config.lr` that a step trains with.

    The rate rises linearly over `warmup_steps`, reaching `lr` in the last of them. Over the other
    steps of the run it stays, or falls towards `min_lr_ratio * lr`, which it would reach in the
    step after the last.

    Args:
        config: Schedule, warm-up and least rate.
        num_steps: Number of steps of the run; None only for a constant schedule.
        step: Number of the step, from 0.
    """
    warmup = config.warmup_steps
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    assert num_steps is not None, "a schedule that falls needs the number of steps"
    done = min(1.0, (step - warmup) / max(1, num_steps - warmup))
    left = 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * left
