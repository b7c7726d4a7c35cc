"""Makes environments by the id that the config gives."""

from __future__ import annotations

import contextlib
import importlib

import gymnasium

from tir_alp.config import Config
from tir_alp.tools.make_env import creator_of, make_env


def make_environment(config: Config) -> gymnasium.Env[str, str]:
    """Make one environment.

    Raises:
        ValueError: There is no environment of that id, or it refuses its settings.
    """
    return make_env(config.env.id, config.env.kwargs)


def has_agents(config: Config) -> bool:
    """Return whether the environment's episodes are whole agents, which it runs by `play`."""
    with contextlib.suppress(Exception):  # of any module; `make_environment` says which
        if module := config.env.id.rpartition(":")[0]:
            importlib.import_module(module)  # which registers the environment
        return hasattr(creator_of(config.env.id), "play")
    return False
