"""Checks that an environment can take an action, and that prompts leave room for an answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

import gymnasium

from tir_alp.config import Config
from tir_alp.rollouts.data import Task
from tir_alp.rollouts.renderer import Renderer
from tir_alp.tools.outcome import Outcome

_HARMLESS = ("```python\nprint(1)\n```",)  # for an environment without `harmless_actions()`
_ANSWER = "I do not know."  # shows whether an episode goes on after it


def check_environment(
    config: Config,
    renderer: Renderer,
    tasks: Sequence[Task],
    make_env: Callable[[], gymnasium.Env[str, str]],
) -> dict[str, Any]:
    """Check that prompts leave room for an answer, and that the environment can take an action.

    The actions are harmless: those of the environment's `harmless_actions()`, if it has this
    method. Whatever they need, such as a sandbox, starts or refuses here and not in the first step.

    Args:
        config: Config of the run.
        renderer: Renders the prompts whose length is checked.
        tasks: Tasks to reset the environment to.
        make_env: Makes the environment, which is closed afterwards.

    Returns:
        The environment's `run_report()`, which is JSON-serialisable and meant for people to read;
        empty if it has no such method. Its key `warnings` holds sentences that must not be
        overlooked.

    Raises:
        ValueError: If a prompt is too long or the environment cannot take an action.
    """
    with closing(make_env()) as env:
        for task in tasks:
            text, _ = env.reset(seed=task.seed, options=task.to_options())
            renderer.prompt_within(text, config.rollout.max_context_tokens, task.task_id)
        says = env.has_wrapper_attr("harmless_actions")
        actions = env.get_wrapper_attr("harmless_actions")() if says else ()
        actions = actions or _HARMLESS
        if renderer.no_observations:
            actions = (*actions, _ANSWER)
        for action in actions:
            env.reset(seed=tasks[0].seed, options=tasks[0].to_options())
            *_, terminated, truncated, info = env.step(action)
            if renderer.no_observations and not (terminated or truncated):
                raise ValueError(_needs_observations(config, renderer))
            if Outcome(info.get("outcome", Outcome.OK)).is_infrastructure:
                raise ValueError(f"{config.env.id!r} cannot work here: {info.get('error')}")
        has_report = env.has_wrapper_attr("run_report")
        return env.get_wrapper_attr("run_report")() if has_report else {}


def _needs_observations(config: Config, renderer: Renderer) -> str:
    return (
        f"an episode of {config.env.id!r} goes on after its first turn, and the chat template "
        f"cannot show what the environment returns then: {renderer.no_observations}. Set "
        "model.path to a model whose template has the role 'tool', or env.id to an environment of "
        "one turn"
    )
