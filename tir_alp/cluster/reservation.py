"""The Ray cluster of a run, and the places that its parts have in it.

All places are reserved together, before anything starts: of a cluster that is too small, what is
missing is said at once, and waited for.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import placement_group, remove_placement_group

from tir_alp.cluster.config import ActorsConfig, ClusterConfig
from tir_alp.cluster.watched_actor import wait_for
from tir_alp.config import Config

KINDS = {
    "trainer": "trainer",
    "engines": "engine",
    "environments": "environment",
    "sandboxes": "sandbox",
}
"""Kinds of parts, in the order of their places, and what one of them is called."""

_SAID_AFTER_S = 5.0  # who waits for room longer than that is told for what
_CLIENT_TRIES = 3  # to be taken by a cluster, as a client


def check_gpus(config: Config) -> None:
    """See that servers get the GPUs that they take: Ray shows a part no others.

    Raises:
        ValueError: If an engine has too few, or does not begin with its first.
    """
    taken, given = config.engine.gpus, config.cluster.engines.gpus
    if taken and (taken.start or len(taken) > math.ceil(given)):
        raise ValueError(
            f"the servers of an engine take {len(taken)} GPUs from engine.first_gpu = "
            f"{taken.start} on, but Ray gives it {given:g}: set cluster.engines.gpus = "
            f"{len(taken)} and engine.first_gpu = 0"
        )


def parts_of(config: ClusterConfig) -> dict[str, ActorsConfig]:
    """What each kind of `KINDS` is to be."""
    return {
        "trainer": config.trainer,
        "engines": config.engines,
        "environments": config.environments,
        "sandboxes": config.sandboxes,
    }


def connect(config: ClusterConfig, log: Callable[[str], None]) -> None:
    """Join the cluster, or start one on this machine with as many cores as parts ask for.

    Raises:
        ValueError: If there is none.
    """
    if config.address == "local":
        cpus = sum(part.count * part.cpus for part in parts_of(config).values())
        where: dict[str, Any] = {"num_cpus": math.ceil(cpus), "include_dashboard": False}
    else:
        where = {}
    for tries_left in reversed(range(_CLIENT_TRIES)):
        try:
            ray.init(
                config.address,
                namespace="tir_alp",
                logging_level=logging.WARNING,
                log_to_driver=False,
                **where,
            )
            return
        except (ConnectionError, RayError, ValueError) as error:
            # The head's server of a client can die in its start, forked beside gRPC's threads.
            if tries_left and isinstance(error, ConnectionAbortedError):
                log(f"the Ray cluster at {config.address!r} did not take us; once more")
                continue
            raise ValueError(f"there is no Ray cluster at {config.address!r}: {error}") from error


async def reserve(config: ClusterConfig, log: Callable[[str], None]) -> Any:
    """The placement group, with a bundle a part in the order of `KINDS`.

    Raises:
        ValueError: If there is no room for it in time.
    """
    parts = parts_of(config)
    bundles = [_bundle(parts[kind]) for kind in KINDS for _ in range(parts[kind].count)]
    places = placement_group(bundles, strategy="SPREAD" if config.spread else "PACK")
    ready = wait_for(places.ready())
    first_s = min(_SAID_AFTER_S, config.start_timeout_s)
    if not (await asyncio.wait([ready], timeout=first_s))[0]:
        log(f"waiting for room in the cluster: {_room(parts)}")
        if not (await asyncio.wait([ready], timeout=config.start_timeout_s - first_s))[0]:
            remove_placement_group(places)
            raise ValueError(
                f"the cluster did not have room within {config.start_timeout_s:g} s: "
                f"{_room(parts)}: lower cluster.*.count, cpus or gpus, or add nodes"
            )
    await ready
    return places


def _room(parts: dict[str, ActorsConfig]) -> str:
    """What parts ask for, and what of the cluster is free."""
    wanted = {kind: part.count for kind, part in parts.items()}
    has, free = ray.cluster_resources(), ray.available_resources()
    figures = [str(wanted)]
    for name in ("CPU", "GPU"):
        asked = sum(part.count * _bundle(part).get(name, 0.0) for part in parts.values())
        of = f"{free.get(name, 0):g} of {has.get(name, 0):g} free"
        figures.append(f"{asked:g} {name}s asked, {of}")
    return ", ".join(figures)


def _bundle(part: ActorsConfig) -> dict[str, float]:
    gpus = {"GPU": part.gpus} if part.gpus else {}
    return {"CPU": part.cpus, **gpus}
