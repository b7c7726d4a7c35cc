"""Chooses where the roles of a run live: in this process, or in a cluster."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from tir_alp.config import Config
from tir_alp.roles import Placement
from tir_alp.run.local_placement import LocalPlacement


@asynccontextmanager
async def open_placement(
    config: Config, log: Callable[[str], None] = print
) -> AsyncIterator[Placement]:
    """Here, or on the cluster that the config names.

    Raises:
        ValueError: If there is no such cluster, or it is too small.
    """
    if not config.cluster.is_used:
        yield LocalPlacement(config, log)
        return
    try:
        from tir_alp.cluster.placement import open_cluster
    except ImportError as error:
        raise ValueError(f"{error}; a cluster needs: pip install 'tir_alp[ray]'") from error
    async with open_cluster(config) as cluster:
        yield cluster
