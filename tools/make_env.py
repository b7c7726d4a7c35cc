"""Makes an environment by its id and settings; what is wrong with them is said by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium
from gymnasium.envs.registration import load_env_creator

from tir_alp.tools.env_ids import hint
from tir_alp.tools.env_settings import settings_mistake

_WHERE = " was raised from the environment creator for "  # gymnasium adds it, and all settings


def make_env(id: str, kwargs: Mapping[str, Any]) -> gymnasium.Env[Any, Any]:
    """Make one environment.

    Args:
        id: Id of the environment, as `gymnasium.make` takes it.
        kwargs: Its settings, which a config has as `env.kwargs`.

    Raises:
        ValueError: There is no environment of that id, or it refuses its settings.
    """
    try:
        return gymnasium.make(id, disable_env_checker=True, **kwargs)
    except gymnasium.error.UnregisteredEnv as error:
        reason = f"{str(error).rstrip('.')}{hint(id)}"
        raise ValueError(f"cannot make the environment {id!r}: {reason}") from error
    except (gymnasium.error.Error, ImportError) as error:
        raise ValueError(f"cannot make the environment {id!r}: {error}") from error
    except TypeError as error:
        reason = _mistake(id, kwargs) or f"env.kwargs: {str(error).partition(_WHERE)[0]}"
        raise ValueError(f"{id!r} does not take its settings: {reason}") from error


def creator_of(id: str) -> Any:
    """Return the class or function that makes the environments of an id that is registered."""
    entry_point = gymnasium.spec(id.rpartition(":")[2]).entry_point
    return load_env_creator(entry_point) if isinstance(entry_point, str) else entry_point


def _mistake(id: str, kwargs: Mapping[str, Any]) -> str:
    creator = creator_of(id)
    return "" if creator is None else settings_mistake(creator, kwargs)
