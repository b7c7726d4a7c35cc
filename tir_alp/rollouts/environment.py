"""Makes environments by the id that the config gives."""

from __future__ import annotations

import gymnasium

from tir_alp.config import Config


def make_environment(config: Config) -> gymnasium.Env[str, str]:
    """Make one environment.

    Raises:
        ValueError: There is no environment of that id, or it refuses its settings.
    """
    try:
        return gymnasium.make(config.env.id, disable_env_checker=True, **config.env.kwargs)
    except (gymnasium.error.Error, ImportError) as error:
        raise ValueError(f"cannot make the environment {config.env.id!r}: {error}") from error
    except TypeError as error:
        raise ValueError(f"{config.env.id!r} does not take env.kwargs: {error}") from error
