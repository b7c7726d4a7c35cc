"""Environments by the name that the config gives them, and the renderer that fits one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gymnasium

from tir_alp.config import Config

if TYPE_CHECKING:
    from tir_alp.renderer import Renderer


def make_environment(config: Config) -> gymnasium.Env[str, str]:
    """Make one environment. Raises ValueError if there is none of that name, or it refuses."""
    try:
        return gymnasium.make(config.env.id, disable_env_checker=True, **config.env.kwargs)
    except (gymnasium.error.Error, ImportError) as error:
        raise ValueError(f"cannot make the environment {config.env.id!r}: {error}") from error
    except TypeError as error:
        raise ValueError(f"{config.env.id!r} does not take env.kwargs: {error}") from error


def make_renderer(config: Config, tokenizer: Any, env: gymnasium.Env[str, str]) -> Renderer:
    """Make the renderer that fits tokenizer and environment.

    The environment says how it reads calls (`call_format`, else fenced code) and which tools the
    chat template has to show (`tool_schemas`, else none).

    Raises:
        ValueError: They do not fit together.
    """
    turns = {
        name: env.get_wrapper_attr(attribute)
        for name, attribute in (("call_format", "call_format"), ("tools", "tool_schemas"))
        if env.has_wrapper_attr(attribute)
    }
    from tir_alp.renderer import Renderer  # not needed where environments run, nor is torch

    return Renderer(
        tokenizer,
        system=config.model.system,
        max_observation_tokens=config.rollout.max_observation_tokens,
        rewritten_history=config.model.rewritten_history,
        **turns,
    )
