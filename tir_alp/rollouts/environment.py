"""Environments by the name that the config gives them, and the renderer that fits one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import gymnasium

from tir_alp.config import Config

if TYPE_CHECKING:
    pass


def make_environment(config: Config) -> gymnasium.Env[str, str]:
    """Make one environment. Raises ValueError if there is none of that name, or it refuses."""
    try:
        return gymnasium.make(config.env.id, disable_env_checker=True, **config.env.kwargs)
    except (gymnasium.error.Error, ImportError) as error:
        raise ValueError(f"cannot make the environment {config.env.id!r}: {error}") from error
    except TypeError as error:
        raise ValueError(f"{config.env.id!r} does not take env.kwargs: {error}") from error
