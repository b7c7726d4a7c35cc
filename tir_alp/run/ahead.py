"""Starts the tools of an environment while this process is still importing torch.

A sandbox is made of processes of its own: it takes a second or two until one has started and has
been attacked by its own probes, and next to no time of this process. Nothing is decided here. What
cannot be started is started once more by the checks of the run's start, which say why it fails.
"""

from __future__ import annotations

from contextlib import closing, suppress
from threading import Thread

import gymnasium

from tir_alp.config import Config
from tir_alp.rollouts.environment import make_environment


def start_tools(config: Config) -> Thread | None:
    """Start what the environment's `run_report` starts, in a thread that ends when it is up.

    Args:
        config: Config of the run.

    Returns:
        The thread; None if there is nothing to start in this process.
    """
    if config.cluster.is_used:  # environments and their tools live in actors
        return None
    try:
        env = make_environment(config)  # here, so that only one thread at a time imports much
    except Exception:  # an environment of somebody else can raise anything
        return None
    thread = Thread(target=_start, args=(env,), name="tools")
    thread.start()
    return thread


def _start(env: gymnasium.Env[str, str]) -> None:
    with suppress(Exception), closing(env):
        if env.has_wrapper_attr("run_report"):
            env.get_wrapper_attr("run_report")()
