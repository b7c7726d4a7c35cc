"""Chooses where the roles of a run live: in this process, or in a cluster."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from tir_alp.config import Config
from tir_alp.roles import Placement
from tir_alp.run.local_placement import LocalPlacement

OpenCluster = Callable[[Config], AbstractAsyncContextManager[Placement]]
"""Opens the cluster that a config names."""


@asynccontextmanager
async def open_placement(
    config: Config, open_cluster: OpenCluster, log: Callable[[str], None] = print
) -> AsyncIterator[Placement]:
    """Open the placement that the config asks for.

    Args:
        config: Config of the run.
        open_cluster: Used where the config names a cluster.
        log: Called with a line for people about what happens to the engine's servers.

    Raises:
        ValueError: If there is no such cluster, or it is too small.
    """
    if not config.cluster.is_used:
        yield LocalPlacement(config, log)
        return
    async with open_cluster(config) as cluster:
        yield cluster
