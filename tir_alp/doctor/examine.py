"""All checks of a start, in two stages: before weights are loaded, and with a live engine."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium

from tir_alp.config import Config
from tir_alp.doctor.check_result import CheckResult
from tir_alp.doctor.conversation import check_fence, check_template, check_tokenizer
from tir_alp.doctor.engine import EngineCheck, tolerance_of
from tir_alp.doctor.long_context import advice
from tir_alp.doctor.machine import check_disk, free_memory, shape_of
from tir_alp.doctor.memory import Shape, check_memory, needs, node_needs
from tir_alp.doctor.sandbox import check_sandbox
from tir_alp.engines.base import Engine, LogprobSource
from tir_alp.roles import Node
from tir_alp.rollouts.data import Task
from tir_alp.rollouts.renderer import Renderer
from tir_alp.training.policy import compute_device

_HERE = ("none", "local")  # addresses of clusters whose processes are all on this machine
_NUM_RANDOM_IDS = 24
_NUM_SAMPLED = 16  # tokens that are sampled after a prompt


class Refused(ValueError):
    """A check failed that `doctor.ignore` does not name."""


def examine_config(
    config: Config,
    model_path: str,
    tokenizer: Any,
    renderer: Renderer,
    env: gymnasium.Env[str, str],
    task: Task,
    nodes: Sequence[Node] = (),
) -> list[CheckResult]:
    """Make the checks that need no weights; they take about a second.

    Args:
        config: Config of the run.
        model_path: Path or hub id of the model.
        tokenizer: Tokenizer of the run.
        renderer: Renderer of the run.
        env: Environment that a program is tried in.
        task: A task of the run, to reset the environment to.
        nodes: The machines of the run's actors; see `Placement.nodes`.
    """
    return [
        *examine_model(config, model_path, tokenizer, renderer, env, nodes),
        check_sandbox(env, task),
    ]


def examine_model(
    config: Config,
    model_path: str,
    tokenizer: Any,
    renderer: Renderer,
    env: gymnasium.Env[str, str],
    nodes: Sequence[Node] = (),
) -> list[CheckResult]:
    """Make those of the checks that need neither weights nor a task; see `examine_config`."""
    shape = shape_of(model_path)
    is_known = bool(nodes) or config.cluster.address in _HERE
    return [
        *([_check_memory(config, shape, nodes)] if is_known else []),
        check_disk(config, shape, Path("runs")),
        check_history(tokenizer, config, renderer, env),
        check_fence(tokenizer, renderer),
    ]


def _check_memory(config: Config, shape: Shape, nodes: Sequence[Node]) -> CheckResult:
    """Compare with the memory of this machine, or with that of each node of a cluster."""
    device = config.trainer.device
    if nodes:
        if device == "auto":
            device = "cuda" if config.cluster.trainer.gpus else "cpu"
        found = [need for node in nodes for need in node_needs(config, shape, device, node)]
        known = {node.name: node.memory for node in nodes if node.memory is not None}
        return check_memory(found, known)
    if device == "auto" or not config.cluster.is_used:
        device = compute_device(device).type
    num_cpus, free = os.cpu_count() or 1, free_memory()
    result = check_memory(needs(config, shape, device, num_cpus), free)
    figures = [result.figure, advice(config, shape, device, free, num_cpus)]
    return replace(result, figure="; ".join(filter(None, figures)))


def check_history(
    tokenizer: Any, config: Config, renderer: Renderer, env: gymnasium.Env[str, str]
) -> CheckResult:
    """Check that the chat template only appends as a conversation grows.

    Args:
        tokenizer: Tokenizer of the run.
        config: Config of the run.
        renderer: Renderer of the run.
        env: Environment whose tools the template has to show.
    """
    if env.has_wrapper_attr("play"):
        return CheckResult("template", True, "what it rewrites begins a trace of its own")
    if config.model.rewritten_history == "fork" and renderer.rewrites:
        return CheckResult(
            "template", True, f"a new trace begins where it rewrites: {renderer.rewrites[0]}"
        )
    if config.model.rewritten_history == "append":
        return CheckResult(
            "template", True, "what it would rewrite stays as it was sampled, as configured"
        )
    if renderer.no_observations:
        return CheckResult("template", True, "an episode is one turn, which the template shows")
    tools = env.get_wrapper_attr("tool_schemas") if env.has_wrapper_attr("tool_schemas") else ()
    return check_template(tokenizer, config.model.system, renderer.clock, tools)


async def examine_engine(
    config: Config,
    engine: Engine,
    outline: Any,
    trainer: LogprobSource,
    weights: Callable[[], Any],
    version: int,
    tokenizer: Any,
    renderer: Renderer,
    prompts: Sequence[str],
) -> list[CheckResult]:
    """Make the checks that need a trainer and a live engine, and leave both unchanged.

    Args:
        config: Config of the run.
        engine: The engine to check.
        outline: The model without weights; see `load_outline`.
        trainer: Computes the logprobs that the engine's are compared with.
        weights: Returns the trainer's current weights in the form that `load_weights` takes.
        version: Policy version of these weights.
        tokenizer: Tokenizer of the run.
        renderer: Renderer of the run.
        prompts: Prompts of a few tasks, as text.
    """
    limit = config.rollout.max_context_tokens
    rng = random.Random(0)
    ids = [renderer.prompt(text).token_ids[: limit - _NUM_SAMPLED] for text in prompts]
    ids += [
        tuple(
            rng.randrange(len(tokenizer)) for _ in range(min(_NUM_RANDOM_IDS, limit - _NUM_SAMPLED))
        )
        for _ in range(2)
    ]
    check = EngineCheck(
        engine,
        trainer,
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


def demand(results: Sequence[CheckResult], ignore: Sequence[str]) -> list[str]:
    """Refuse to start if a check failed; return one sentence per failed check that is ignored.

    Args:
        results: Results of all checks.
        ignore: Names of the checks that may fail.

    Raises:
        Refused: If another check failed; the message has two lines per failed check.
    """
    failed = [result for result in results if not result.holds]
    refused = [each for each in failed if each.check not in ignore]
    if refused:
        lines = [f"{each.check}: {each.figure}\n  fix: {each.fix}" for each in refused]
        names = ",".join(each.check for each in refused)
        raise Refused(
            "\n".join(["the run would not be sound:", *lines])
            + f"\nto start anyway: --doctor.ignore {names}"
        )
    return [f"ignored by doctor.ignore: {each.check}: {each.figure}" for each in failed]
