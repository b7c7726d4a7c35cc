"""Makes environments by the id that the config gives."""

from __future__ import annotations

import contextlib
import importlib
from typing import Any

import gymnasium
from gymnasium.envs.registration import load_env_creator

from tir_alp.config import Config
from tir_alp.rollouts.env_settings import settings_mistake
from tir_alp.tools.env_ids import hint

_WHERE = " was raised from the environment creator for "  # gymnasium adds it, and all settings


def make_environment(config: Config) -> gymnasium.Env[str, str]:
    """Make one environment.

    Raises:
        ValueError: There is no environment of that id, or it refuses its settings.
    """
    try:
        return gymnasium.make(config.env.id, disable_env_checker=True, **config.env.kwargs)
    except gymnasium.error.UnregisteredEnv as error:
        reason = f"{str(error).rstrip('.')}{hint(config.env.id)}"
        raise ValueError(f"cannot make the environment {config.env.id!r}: {reason}") from error
    except (gymnasium.error.Error, ImportError) as error:
        raise ValueError(f"cannot make the environment {config.env.id!r}: {error}") from error
    except TypeError as error:
        reason = _mistake(config) or f"env.kwargs: {str(error).partition(_WHERE)[0]}"
        raise ValueError(f"{config.env.id!r} does not take its settings: {reason}") from error


def has_agents(config: Config) -> bool:
    """Return whether the environment's episodes are whole agents, which it runs by `play`."""
    with contextlib.suppress(Exception):  # of any module; `make_environment` says which
        if module := config.env.id.rpartition(":")[0]:
            importlib.import_module(module)  # which registers the environment
        return hasattr(_creator(config), "play")
    return False


def _creator(config: Config) -> Any:
    entry_point = gymnasium.spec(config.env.id.rpartition(":")[2]).entry_point
    return load_env_creator(entry_point) if isinstance(entry_point, str) else entry_point


def _mistake(config: Config) -> str:
    creator = _creator(config)
    return "" if creator is None else settings_mistake(creator, config.env.kwargs)
