"""Makes a run's environment. Light: also imported where there is no torch."""

from __future__ import annotations

import gymnasium

from tir_alp.config import EnvConfig


def make_environment(config: EnvConfig) -> gymnasium.Env[str, str]:
    """Make one environment. Raises ValueError if there is none of that name, or it refuses."""
    try:
        return gymnasium.make(config.id, disable_env_checker=True, **config.kwargs)
    except (gymnasium.error.Error, ImportError) as error:
        raise ValueError(f"cannot make the environment {config.id!r}: {error}") from error
    except TypeError as error:
        raise ValueError(f"{config.id!r} does not take env.kwargs: {error}") from error
