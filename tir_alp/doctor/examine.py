"""All checks of a start, in two parts: before weights are loaded, and with a live engine."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gymnasium

from tir_alp.config import Config
from tir_alp.doctor.conversation import check_fence, check_template, check_tokenizer
from tir_alp.doctor.engine import EngineCheck, tolerance_of
from tir_alp.doctor.finding import Finding
from tir_alp.doctor.machine import (
    Shape,
    check_disk,
    check_memory,
    free_memory,
    memory_needed,
    shape_of,
)
from tir_alp.doctor.sandbox import check_sandbox
from tir_alp.engines.base import Engine, LogprobSource
from tir_alp.rollouts.data import Task
from tir_alp.rollouts.renderer import Renderer
from tir_alp.training.policy import compute_device

_NUM_RANDOM_IDS = 24
_ROOM = 16  # tokens that are sampled behind a prompt


class Refused(ValueError):
    """A check failed, and was not told to be ignored."""


def examine_config(
    config: Config,
    model_path: str,
    tokenizer: Any,
    renderer: Renderer,
    env: gymnasium.Env[str, str],
    task: Task,
) -> list[Finding]:
    """What can be told without the model's weights; takes a second."""
    shape = shape_of(model_path)
    return [
        # Actors have memory and GPUs of their own; the process that starts them may have none.
        *([] if config.cluster.is_used else [_check_memory(config, shape)]),
        check_disk(config, shape, Path("runs")),
        _check_history(tokenizer, config),
        check_fence(tokenizer, renderer),
        check_sandbox(env, task),
    ]


def _check_memory(config: Config, shape: Shape) -> Finding:
    device = compute_device(config.trainer.device).type
    return check_memory(memory_needed(config, shape, device), free_memory(device))


def _check_history(tokenizer: Any, config: Config) -> Finding:
    if config.model.rewritten_history == "append":
        return Finding("template", True, "what it would rewrite stays as it was sampled, as asked")
    return check_template(tokenizer, config.model.system)


async def examine_engine(
    config: Config,
    engine: Engine,
    outline: Any,
    judge: LogprobSource,
    weights: Callable[[], Any],
    version: int,
    tokenizer: Any,
    renderer: Renderer,
    prompts: Sequence[str],
) -> list[Finding]:
    """What needs a trainer and a live engine; both are afterwards as they were before.

    Args:
        config: Of the run.
        engine: That samples.
        outline: Of the model; see `load_outline`.
        judge: The trainer.
        weights: What the engine's `load_weights` takes, of the trainer as it is.
        version: Of the weights.
        tokenizer: Of the run.
        renderer: Of the run.
        prompts: Texts of a few tasks.
    """
    limit = config.rollout.max_context_tokens
    rng = random.Random(0)
    ids = [renderer.prompt(text).token_ids[: limit - _ROOM] for text in prompts]
    ids += [
        tuple(rng.randrange(len(tokenizer)) for _ in range(min(_NUM_RANDOM_IDS, limit - _ROOM)))
        for _ in range(2)
    ]
    check = EngineCheck(
        engine,
        judge,
        outline.get_input_embeddings().weight.shape[0],
        ids,
        config.rollout.temperature,
        renderer.stop_token_ids,
        tolerance_of(config),
    )
    return [
        check_tokenizer(tokenizer, renderer, outline, limit),
        *await check.logprobs(),
        await check.stop(),
        await check.sync(weights, version),
    ]


def demand(findings: Sequence[Finding], ignore: Sequence[str]) -> list[str]:
    """Stop where a check failed; returns one sentence for each that failed and is ignored.

    Raises:
        Refused: With a line for each other one that failed.
    """
    failed = [finding for finding in findings if not finding.holds]
    refused = [each for each in failed if each.check not in ignore]
    if refused:
        lines = [f"{each.check}: {each.figure}\n  fix: {each.fix}" for each in refused]
        names = ",".join(each.check for each in refused)
        raise Refused(
            "\n".join(["the run would not be sound:", *lines])
            + f"\nto start all the same: --doctor.ignore {names}"
        )
    return [f"ignored by doctor.ignore: {each.check}: {each.figure}" for each in failed]
