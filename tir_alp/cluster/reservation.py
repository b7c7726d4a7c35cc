"""The Ray cluster of a run, and the resources that are reserved in it for the run's actors.

All actors' resources are reserved together, before anything starts. If the cluster is too small,
what is missing is logged at once, and waited for.
"""

from __future__ import annotations

import asyncio
import logging
import math
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import placement_group, remove_placement_group

from tir_alp.cluster.watched_actor import wait_for
from tir_alp.config import ActorsConfig, ClusterConfig, Config
from tir_alp.engines.base import Log

KINDS = {
    "trainer": "trainer",
    "engines": "engine",
    "environments": "environment",
    "sandboxes": "sandbox",
}
"""Kinds of actors, in the order of `ClusterConfig.actors`, and the name of one of each kind."""

_LOG_AFTER_S = 5.0  # of waiting for room
_CLIENT_TRIES = 3  # to join a cluster as a client


def check_gpus(config: Config) -> None:
    """Check that servers get the GPUs that they take: Ray shows an actor no others.

    Raises:
        ValueError: If an engine's actor has too few, or the engine does not begin with its first.
    """
    taken, given = config.engine.gpus, config.cluster.engines.gpus
    if taken and (taken.start or len(taken) > math.ceil(given)):
        raise ValueError(
            f"an engine takes {len(taken)} GPUs, from engine.first_gpu = {taken.start} on, but Ray "
            f"gives its actor {given:g}: set cluster.engines.gpus = {len(taken)} and "
            "engine.first_gpu = 0"
        )


def connect(config: ClusterConfig, log: Log) -> None:
    """Join the cluster, or start one on this machine with as many cores as the actors ask for.

    Raises:
        ValueError: If there is no such cluster.
    """
    if config.address == "local":
        cpus = sum(each.count * each.cpus for each in config.actors.values())
        options: dict[str, Any] = {"num_cpus": math.ceil(cpus), "include_dashboard": False}
        # Ray's actors give way to all other processes; these are the run itself.
        options["_system_config"] = {"worker_niceness": 0}
    else:
        options = {}
    for tries_left in reversed(range(_CLIENT_TRIES)):
        try:
            ray.init(
                config.address,
                namespace="tir_alp",
                logging_level=logging.WARNING,
                log_to_driver=False,
                **options,
            )
            return
        except (ConnectionError, RayError, ValueError) as error:
            # The process that the head forks for a client can die at its start, because gRPC's
            # threads run while it forks.
            if tries_left and isinstance(error, ConnectionAbortedError):
                log(f"the Ray cluster at {config.address!r} refused the connection; trying again")
                continue
            raise ValueError(f"there is no Ray cluster at {config.address!r}: {error}") from error


async def reserve(config: ClusterConfig, log: Log) -> Any:
    """Reserve the actors' resources; returns the placement group, with one bundle per actor.

    The bundles are in the order of `KINDS`.

    Raises:
        ValueError: If there is no room for them in time.
    """
    actors = config.actors
    bundles = [_bundle(actors[kind]) for kind in KINDS for _ in range(actors[kind].count)]
    reservation = placement_group(bundles, strategy="SPREAD" if config.spread else "PACK")
    ready = wait_for(reservation.ready())
    first_s = min(_LOG_AFTER_S, config.start_timeout_s)
    if not (await asyncio.wait([ready], timeout=first_s))[0]:
        log(f"waiting for room in the cluster: {_room(actors)}")
        if not (await asyncio.wait([ready], timeout=config.start_timeout_s - first_s))[0]:
            remove_placement_group(reservation)
            raise ValueError(
                f"the cluster did not have room within {config.start_timeout_s:g} s: "
                f"{_room(actors)}: lower cluster.*.count, cpus or gpus, or add nodes"
            )
    await ready
    return reservation


def _room(actors: dict[str, ActorsConfig]) -> str:
    """What the actors ask for, and how much of the cluster is free, for a message."""
    wanted = {kind: each.count for kind, each in actors.items()}
    total, free = ray.cluster_resources(), ray.available_resources()
    figures = [str(wanted)]
    for name in ("CPU", "GPU"):
        asked = sum(each.count * _bundle(each).get(name, 0.0) for each in actors.values())
        of_all = f"{free.get(name, 0):g} of {total.get(name, 0):g} free"
        figures.append(f"{asked:g} {name}s asked, {of_all}")
    return ", ".join(figures)


def _bundle(actor: ActorsConfig) -> dict[str, float]:
    gpus = {"GPU": actor.gpus} if actor.gpus else {}
    return {"CPU": actor.cpus, **gpus}
